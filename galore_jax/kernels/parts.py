"""Large arrays by parts: XLA keeps in memory what a kernel would not, so it is given less."""


def equal_parts(rows: int, size: int, most: int) -> int:
    """Into how many equal parts to cut an array of some rows.

    Args:
      rows: to be cut between.
      size: numbers in the array.
      most: numbers in a part, up to eight times fewer for equal parts.

    Returns:
      A divisor of rows; 1 where none is near, for in a remainder XLA would copy the whole.
    """
    fewest = -(-size // most)
    return next((n for n in range(fewest, 8 * fewest) if rows % n == 0), 1)
