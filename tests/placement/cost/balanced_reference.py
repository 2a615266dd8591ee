"""The replica rule `balanced` once more: plain Python, token by token, from the text of docs/model.md alone."""

from collections import defaultdict
from fractions import Fraction


class Sender:
    """One rank's memory of what it has sent in one layer.

    Args:
        holders: {expert: ranks that hold it}.
        nodes: node of each rank.
        top_k: K.
    """

    def __init__(self, holders: dict[int, list[int]], nodes: list[int], top_k: int) -> None:
        self.holders, self.nodes, self.top_k = holders, nodes, top_k
        self.so_far = dict.fromkeys(range(len(nodes)), 0)

    def send(self, batch: list[tuple[int, int, list[int]]]) -> list[list[int]]:
        """Ranks of a batch's experts, -1 = none; each token is (number, rank where it is or -1, expert ids)."""
        known = dict(self.so_far)
        replicated = 0
        for _, _, ids in batch:
            for expert in ids:
                if expert >= 0 and len(self.holders[expert]) == 1:
                    known[self.holders[expert][0]] += 256
                elif expert >= 0:
                    replicated += 256
        share = -(-replicated // len(self.nodes))
        rows = [self._one(number, near, ids, known, share) for number, near, ids in batch]
        tokens = sum(any(e >= 0 for e in ids) for _, _, ids in batch)
        for rank in self.so_far:
            sent = 256 * sum(row.count(rank) for row in rows)
            self.so_far[rank] = int(Fraction((self.so_far[rank] + sent) * 4096, 4096 + tokens))
        return rows

    def _one(self, number: int, near: int, ids: list[int], known: dict[int, int], share: int) -> list[int]:
        used = {self.holders[e][0] for e in ids if e >= 0 and len(self.holders[e]) == 1}
        joined = 0
        while True:
            left = [e for e in ids if e >= 0 and not used & set(self.holders[e])]
            if not left:
                break
            in_use = {self.nodes[r] for r in used} | ({self.nodes[near]} if near >= 0 else set())
            score = {
                r: (sum(r in self.holders[e] for e in left), r == near, self.nodes[r] in in_use)
                for r in range(len(self.nodes))
                if any(r in self.holders[e] for e in left)
            }
            tied = [r for r in score if score[r] == max(score.values())]
            used.add(self._take(tied, known, share, number * 2 * self.top_k + self.top_k + joined))
            joined += 1
        row = []
        for place, expert in enumerate(ids):
            open_ranks = sorted(used & set(self.holders[expert])) if expert >= 0 else []
            if expert < 0:
                row.append(-1)
            elif len(self.holders[expert]) == 1:
                row.append(self.holders[expert][0])
            else:
                row.append(self._take(open_ranks, known, share, number * 2 * self.top_k + place))
        return row

    @staticmethod
    def _take(tied: list[int], known: dict[int, int], share: int, draw: int) -> int:
        mean = Fraction(sum(known[r] for r in tied), len(tied))
        room = {r: max(Fraction(0), share + mean - known[r]) for r in tied}
        aim = Fraction(draw * 2654435769 % 2**32 // 2**16, 2**16) * sum(room.values())
        passed = Fraction(0)
        for rank in tied:
            passed += room[rank]
            if passed > aim:
                return rank
        raise AssertionError("the last rank with room is always passed")


def serve_trace(ids_TK, near_T, holders, nodes, batch):
    """(T, K) nested list: ranks of a layer, steps of `batch` tokens cut into lanes, unknown places at home."""
    tokens, ranks = len(ids_TK), len(nodes)
    width = min(batch, tokens)
    length = tokens // width
    batches = defaultdict(list)
    for t in range(tokens):
        full = t < width * length
        step, number = (t % length, t // length) if full else (length, t - width * length)
        batches[step, int(near_T[t]) if near_T[t] >= 0 else t % ranks].append((number, t))
    senders = [Sender(holders, nodes, len(ids_TK[0])) for _ in range(ranks)]
    rows = [None] * tokens
    for (_, sender), members in sorted(batches.items()):
        members.sort()
        sent = senders[sender].send([(n, int(near_T[t]), [int(e) for e in ids_TK[t]]) for n, t in members])
        for (_, t), row in zip(members, sent, strict=True):
            rows[t] = row
    return rows
