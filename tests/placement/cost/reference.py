"""What a placement costs, once more: plain Python loops over plain lists, sharing no code with what they judge.

Written from the model's definition: tokens one by one, ranks one by one, copies one by one.
"""

import random
from dataclasses import dataclass, field

MASK = (1 << 64) - 1


@dataclass
class Setting:
    """What is not in trace and placement; links are (latency, bandwidth), the node's shared bandwidth apart."""

    mode: str
    batch: int = 256
    hidden_bytes: int = 4096
    kv_bytes: int = 1152
    speeds: list[float] | None = None
    intra: tuple[float, float] = (15e-6, 300e9)
    inter: tuple[float, float] = (30e-6, 40e9)
    node_bandwidth: float = float("inf")
    expert: tuple[float, float, float] = (10e-6, 45e-9, 6e-6)
    overhead: float = 0.0
    rule: str = "moeplace"
    seconds_per_byte: dict[tuple[int, int], float] = field(default_factory=dict)  # empty = the two tiers


def order_of(rotation: int, ranks: int) -> list[int]:
    """Ranks in the order that a rotation number prefers them in."""
    row, reverse = divmod(rotation % 4096, 2)
    keys = []
    for rank in range(ranks):
        key = row * ranks + rank + 1
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            key = ((key ^ (key >> 33)) * multiplier) & MASK
        keys.append(key ^ (key >> 33))
    order = sorted(range(ranks), key=keys.__getitem__)
    return order[::-1] if reverse else order


def cover(ids, holders, nodes, near, rotation):
    """{expert: rank} by moeplace's rule."""
    order = order_of(rotation, len(nodes))
    chosen = {e: holders[e][0] for e in ids if len(holders[e]) == 1}
    used = set(chosen.values())
    forced = sorted(used, key=order.index)
    for e in ids:
        if e not in chosen and used & set(holders[e]):
            chosen[e] = near if near in used and near in holders[e] else next(r for r in forced if r in holders[e])
    while len(chosen) < len(ids):
        in_use = {nodes[r] for r in used} | ({nodes[near]} if near >= 0 else set())
        left = [e for e in ids if e not in chosen]
        best = max(order, key=lambda r: (sum(r in holders[e] for e in left), r == near, nodes[r] in in_use))
        used.add(best)
        chosen.update({e: best for e in left if best in holders[e]})
    return chosen


def static_maps(slots_by_layer, rank_of_slot, nodes, experts):
    """[rank][layer][expert] slot: SGLang's static dispatch, as each rank works it out for itself."""

    def near(slots, rank):
        if len(slots) == 1:
            return slots[0]
        own = [s for s in slots if rank_of_slot[s] == rank]
        mates = [s for s in slots if nodes[rank_of_slot[s]] == nodes[rank]]
        if own:
            return own[0]
        return mates[0] if 0 < len(mates) < len(slots) else -1

    maps = []
    for me in range(len(nodes)):
        generator, mine = random.Random(42), []
        for layer_slots in slots_by_layer:
            row = {}
            for e in range(experts):
                slots = [s for s, held in enumerate(layer_slots) if held == e]
                if not slots:
                    continue
                row[e] = near(slots, me)
                if row[e] < 0:
                    wanting = [r for r in range(len(nodes)) if near(slots, r) < 0]
                    whole, rest = divmod(len(wanting), len(slots))
                    drawn = slots * whole + generator.sample(slots, k=rest)
                    generator.shuffle(drawn)
                    row[e] = drawn[wanting.index(me)]
            mine.append(row)
        maps.append(mine)
    return maps


def gateway(source, node, nodes):
    """Rank at which what `source` sends enters a node."""
    if nodes[source] == node:
        return source
    place = source - nodes.index(nodes[source])
    members = [r for r in range(len(nodes)) if nodes[r] == node]
    return members[place % len(members)]


def scatter(copies, source, targets, nodes, amount):
    """Add the copies of one row from `source` to `targets`, once to each other node and forwarded there."""
    for node in {nodes[r] for r in targets}:
        door = gateway(source, node, nodes)
        if door != source:
            copies[source, door] = copies.get((source, door), 0.0) + amount
        for target in targets:
            if nodes[target] == node and target != door:
                copies[door, target] = copies.get((door, target), 0.0) + amount


def exchange_seconds(copies, nodes, setting, row_bytes):
    """Busiest rank inside nodes, plus busiest rank or node between nodes."""
    ranks = range(len(nodes))

    def cost(s, t):
        if setting.seconds_per_byte:
            return setting.seconds_per_byte[s, t]
        return 1 / (setting.intra if nodes[s] == nodes[t] else setting.inter)[1]

    tiers = [0.0, 0.0]
    for tier in (0, 1):
        pairs = {p: c for p, c in copies.items() if p[0] != p[1] and (nodes[p[0]] != nodes[p[1]]) == bool(tier)}
        for r in ranks:
            sent = sum(c * cost(*p) for p, c in pairs.items() if p[0] == r)
            got = sum(c * cost(*p) for p, c in pairs.items() if p[1] == r)
            tiers[tier] = max(tiers[tier], sent, got)
        if tier:
            for n in set(nodes):
                for end in (0, 1):
                    shared = sum(c for p, c in pairs.items() if nodes[p[end]] == n)
                    tiers[1] = max(tiers[1], shared / setting.node_bandwidth)
    return sum(tiers) * row_bytes


def imbalance(values, speeds):
    """max / mean of time over ranks."""
    if not sum(values):
        return 1.0
    return max(v / s for v, s in zip(values, speeds, strict=True)) / (sum(values) / sum(speeds))


def cost(ids_TLK, slots_by_layer, slots_of_rank, nodes, setting):
    """All figures of an evaluation, by name; one long loop, so that it can be read from top to bottom.

    Args:
        ids_TLK: nested lists (T, L, K), -1 = none.
        slots_by_layer: (L, S) experts in slots, -1 = empty.
        slots_of_rank, nodes: by rank.
        setting: the rest.
    """
    tokens, layers, ranks = len(ids_TLK), len(slots_by_layer), len(nodes)
    speeds = setting.speeds or [1.0] * ranks
    speeds = [s * ranks / sum(speeds) for s in speeds]
    rank_of_slot = [r for r, size in enumerate(slots_of_rank) for _ in range(size)]
    experts = max(max(row) for row in slots_by_layer) + 1
    holders = [
        {e: sorted(rank_of_slot[s] for s, held in enumerate(row) if held == e) for e in range(experts)}
        for row in slots_by_layer
    ]
    replicated = any(len(held) > 1 for row in holders for held in row.values())
    maps = static_maps(slots_by_layer, rank_of_slot, nodes, experts) if setting.rule == "nearest-static" else None
    lanes = min(setting.batch, tokens)
    length = tokens // lanes
    scale = setting.batch / lanes

    sums = dict.fromkeys(("d", "dn", "single", "copies", "node_copies", "pairs", "stay", "node_stay"), 0.0)
    load = [[0] * ranks for _ in range(layers)]
    step_load = [[[0] * ranks for _ in range(length)] for _ in range(layers)]
    active = [[[set() for _ in range(ranks)] for _ in range(length)] for _ in range(layers)]
    spread = [[False] * length for _ in range(layers)]
    first = [{} for _ in range(layers)]
    second = [{} for _ in range(layers)]
    attended = [0.0] * ranks
    for t in range(tokens):
        step = t % length if t < lanes * length else None
        owner, before, home = -1, None, t % ranks
        for layer in range(layers):
            ids = [e for e in ids_TLK[t][layer] if e >= 0]
            near = owner if setting.mode == "coherent" else home if replicated else -1
            if setting.rule == "moeplace":
                chosen = cover(ids, holders[layer], nodes, near, t)
            elif setting.rule == "hash":
                hashed = (t // ranks * 2654435769) % 2**32
                chosen = {e: holders[layer][e][hashed % len(holders[layer][e])] for e in ids}
            else:
                asks = near if near >= 0 else home
                chosen = {e: rank_of_slot[maps[asks][layer][e]] for e in ids}
            used = sorted(set(chosen.values()))
            sums["d"] += len(used)
            sums["dn"] += len({nodes[r] for r in used})
            sums["single"] += len(used) == 1
            for e, r in chosen.items():
                load[layer][r] += 1
                if step is not None:
                    step_load[layer][step][r] += 1
                    active[layer][step][r].add(e)
            if len(used) > 1 and step is not None:
                spread[layer][step] = True
            now = chosen[ids_TLK[t][layer][0]] if ids_TLK[t][layer][0] >= 0 else None
            if layer and now is not None and before is not None:
                sums["pairs"] += 1
                sums["stay"] += now == before
                sums["node_stay"] += nodes[now] == nodes[before]
            before = now
            # where copies go
            if setting.mode == "coherent":
                starts = [owner] if owner >= 0 else list(range(ranks)) if layer == 0 else []
                for start in starts:
                    attended[start] += 1 / len(starts) / tokens
                    for r in used:
                        if r != start:
                            amount = 1 / len(starts) / tokens
                            first[layer][start, r] = first[layer].get((start, r), 0.0) + amount
                if used:
                    counts = {r: list(chosen.values()).count(r) for r in used}
                    owner_next = max(used, key=lambda r: (counts[r], r == owner, -r))
                    for r in used:
                        if r != owner_next:
                            second[layer][r, owner_next] = second[layer].get((r, owner_next), 0.0) + 1 / tokens
                    owner = owner_next
            else:
                homes = [home] if replicated and setting.mode == "dispatch-combine" else list(range(ranks))
                targets = used if setting.mode == "dispatch-combine" else list(range(ranks))
                for h in homes:
                    if setting.mode == "dispatch-combine":
                        scatter(first[layer], h, [r for r in targets if r != h], nodes, 1 / len(homes) / tokens)
                    else:
                        for r in targets:
                            first[layer][h, r] = first[layer].get((h, r), 0.0) + 1 / len(homes) / tokens
                    sums["copies"] += 2 * sum(r != h for r in targets) / len(homes)
    if setting.mode != "coherent":
        second = [{(b, a): c for (a, b), c in moved.items()} for moved in first]
    boundaries = range(1, layers) if setting.mode == "coherent" else range(layers)
    moved = [moved for layer in boundaries for moved in (first[layer], second[layer])]
    per = max(len(boundaries), 1)
    node_copies = sum(c for each in moved for (a, b), c in each.items() if nodes[a] != nodes[b]) / per
    if setting.mode == "coherent":
        copies = sum(c for each in moved for c in each.values()) / per
    else:
        copies = sums["copies"] / tokens / layers

    latency = 0.0 if ranks == 1 else (setting.inter if max(nodes) else setting.intra)[0]
    fixed, per_token, per_activated = setting.expert
    seconds = setting.overhead * layers
    for layer in range(layers):
        share = sum(spread[layer]) / length if setting.mode == "coherent" else 1.0
        seconds += latency * (1 + share)
        for exchange in (first[layer], second[layer]):
            seconds += exchange_seconds(exchange, nodes, setting, setting.batch * setting.hidden_bytes)
        slowest = 0.0
        for step in range(length):
            slowest += max(
                (per_token * scale * step_load[layer][step][r] + per_activated * len(active[layer][step][r]))
                / speeds[r]
                for r in range(ranks)
            )
        seconds += fixed + slowest / length
    if setting.mode == "coherent" and ranks > 1:
        spread_kv: dict[tuple[int, int], float] = {}
        for r in range(ranks):
            scatter(spread_kv, r, [x for x in range(ranks) if x != r], nodes, attended[r])
        seconds += latency + exchange_seconds(spread_kv, nodes, setting, setting.batch * setting.kv_bytes)

    by_layer = [imbalance(row, speeds) for row in load]
    even = [1.0] * ranks
    steps = [(layer, step) for layer in range(layers) for step in range(length)]
    cells = tokens * layers
    return {
        "ranks_per_token": sums["d"] / cells,
        "nodes_per_token": sums["dn"] / cells,
        "single_rank_share": sums["single"] / cells,
        "copies_per_token": copies,
        "node_copies_per_token": node_copies,
        "stay_rate": sums["stay"] / max(sums["pairs"], 1),
        "node_stay_rate": sums["node_stay"] / max(sums["pairs"], 1),
        "imbalance_mean": sum(by_layer) / layers,
        "imbalance_worst": max(by_layer),
        "step_imbalance_mean": sum(imbalance(step_load[a][b], even) for a, b in steps) / len(steps),
        "activated_imbalance_mean": sum(imbalance([len(x) for x in active[a][b]], even) for a, b in steps) / len(steps),
        "predicted_seconds": seconds,
        "kv_bytes_per_token": (ranks - 1) * layers * setting.kv_bytes if setting.mode == "coherent" else 0.0,
        "collectives_per_layer": 0.0
        if ranks == 1
        else 1 + sum(map(sum, spread)) / (layers * length)
        if setting.mode == "coherent"
        else 2.0,
    }
