"""Experts on devices: how balanced a placement is, and DeepSeek's placement with redundant experts (EPLB,
2412.19437 section 3.4). Pure NumPy.

Here: P slots that hold an expert each, in the order of their devices; R of them if some experts are held
more than once.
"""

from typing import NamedTuple

import numpy as np

from moejax.options import ConfigError


class Placement(NamedTuple):
    """Attributes:
    expert_LP: the expert in every slot; each device holds P / devices slots, one after the other.
    replicas_LE: in how many slots each expert is.
    """

    expert_LP: np.ndarray
    replicas_LE: np.ndarray


def rebalance(
    load_LE: np.ndarray, replicas: int, groups: int = 1, nodes: int = 1, devices: int = 1
) -> Placement:
    """DeepSeek's placement of experts, some of them held several times.

    Hierarchical if the groups divide evenly over the nodes, else global (one group, one node):
    1. whole groups of experts are packed onto nodes, as many on each (a token is sent to few nodes);
    2. in each node, the expert with the most load per replica is held once more, until all slots are full;
    3. in each node, replicas are packed onto devices, as many on each.
    Packing takes the heaviest first and puts it where the load is least and room is left.

    Args:
      load_LE: routes to each expert of each layer, or anything proportional; not negative.
      replicas: slots P of all devices together, at least E.
      groups: of equally many consecutive experts.
      nodes, devices: of all nodes together.

    Raises ConfigError for numbers that do not divide.
    """
    load_LE = np.asarray(load_LE, np.float64)
    layers, experts = _check(load_LE, replicas, groups, nodes, devices)
    if groups % nodes:
        groups = nodes = 1
    per_group, per_node = experts // groups, replicas // nodes
    expert_LP = np.zeros((layers, replicas), np.int64)
    for layer, load_E in enumerate(load_LE):
        packs = _pack(load_E.reshape(groups, per_group).sum(axis=1), nodes)
        for node, own_groups in enumerate(packs):
            own = np.concatenate([g * per_group + np.arange(per_group) for g in own_groups])
            held, share = _replicate(load_E[own], per_node)
            slots = _pack(share, devices // nodes)
            expert_LP[layer, node * per_node : (node + 1) * per_node] = own[held[slots.ravel()]]
    return Placement(expert_LP, _count(expert_LP, experts))


def in_order(layers: int, experts: int) -> Placement:
    """The usual placement: every expert once, in their order."""
    expert_LP = np.tile(np.arange(experts), (layers, 1))
    return Placement(expert_LP, _count(expert_LP, experts))


def device_load(load_LE: np.ndarray, placement: Placement, devices: int) -> np.ndarray:
    """Load of each device, [L, devices]: an expert's load is shared evenly among its replicas."""
    share_LE = np.asarray(load_LE, np.float64) / np.maximum(placement.replicas_LE, 1)
    share_LP = np.take_along_axis(share_LE, placement.expert_LP, axis=1)
    return share_LP.reshape(len(share_LP), devices, -1).sum(axis=2)


def imbalance(load_LD: np.ndarray) -> np.ndarray:
    """Greatest load over the mean, per layer: a layer's time over that of even devices; 1 is best. Here D:
    devices."""
    mean_L = load_LD.mean(axis=1)
    return np.where(mean_L > 0, load_LD.max(axis=1) / np.maximum(mean_L, 1e-300), 1.0)


def _pack(weight_N: np.ndarray, packs: int) -> np.ndarray:
    """N weights in equally many per pack: [packs, N / packs] of their indices."""
    room = len(weight_N) // packs
    members: list[list[int]] = [[] for _ in range(packs)]
    loads = np.zeros(packs)
    for i in np.argsort(-weight_N, kind="stable"):
        free = [p for p in range(packs) if len(members[p]) < room]
        best = min(free, key=lambda p: loads[p])
        members[best].append(int(i))
        loads[best] += weight_N[i]
    return np.array(members)


def _replicate(load_N: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(item of each slot, load of each slot), every item at least once."""
    held, count_N = list(range(len(load_N))), np.ones(len(load_N))
    for _ in range(slots - len(load_N)):
        most = int(np.argmax(load_N / count_N))
        held.append(most)
        count_N[most] += 1
    held_P = np.array(held)
    return held_P, (load_N / count_N)[held_P]


def _count(expert_LP: np.ndarray, experts: int) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=experts) for row in expert_LP])


def _check(load_LE: np.ndarray, replicas: int, groups: int, nodes: int, devices: int):
    if load_LE.ndim != 2 or not load_LE.size:
        raise ConfigError("loads: a table of layers by experts is needed: [[3, 1, 0, 4], ..]")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ConfigError("loads: every load must be a number, and none below 0")
    experts = load_LE.shape[1]
    for name, n in {"groups": groups, "nodes": nodes, "devices": devices}.items():
        if n < 1:
            raise ConfigError(f"{name}={n}: at least 1 is needed")
    if replicas < experts:
        raise ConfigError(f"replicas={replicas} is below the {experts} experts: each needs a slot")
    if replicas % devices:
        up = -(-replicas // devices) * devices
        raise ConfigError(
            f"replicas={replicas} do not divide evenly over devices={devices}; {up} would work"
        )
    if devices % nodes:
        raise ConfigError(f"devices={devices} do not divide evenly over nodes={nodes}")
    if experts % groups:
        raise ConfigError(f"the {experts} experts do not divide into groups={groups}")
    return load_LE.shape
