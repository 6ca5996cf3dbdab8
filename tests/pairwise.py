"""A few combinations of options in place of all."""

from itertools import combinations, product


def pairwise(*options, where=lambda case: True):
    """A few combinations in which every two values of different options meet.

    Args:
      *options: of each, its values.
      where: whether a combination is possible.
    """
    every = [case for case in product(*options) if where(case)]
    pairs = {case: set(combinations(enumerate(case), 2)) for case in every}
    chosen, missing = [], set().union(*pairs.values())
    while missing:
        chosen.append(max(every, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen
