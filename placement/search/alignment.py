"""Free alignment: ranks of a layer may be renamed without changing its traffic or balance, so name them well.

With clusters of experts fixed in every layer, the names that keep most tokens in place follow from one assignment
problem per boundary, composed forward; that is optimal over all renamings (MoETuner's second program, uniform links,
in polynomial time). Only equal ranks exchange names (`Symmetry`).

Shape letters: L MoE layers, R ranks.
"""

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.symmetry import Symmetry


def align_ranks(flow_LRR: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(L, R) new name of every rank of every layer, given the tokens between ranks of consecutive layers.

    Args:
        flow_LRR: (L-1, R, R) tokens from rank to rank under the present names.
        cluster: decides which ranks may exchange names.
    """
    symmetry, names = Symmetry(cluster), [np.arange(cluster.num_ranks)]
    for flow_RR in flow_LRR:
        flow = np.empty(flow_RR.shape)
        flow[names[-1]] = flow_RR  # rows by the new names of the layer before
        # Tokens that stay in the node count most; staying on the rank decides ties.
        names.append(symmetry.best_names(flow.T, by_block=cluster.num_nodes > 1))
    return np.stack(names)
