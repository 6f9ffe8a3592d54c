"""Search for the table that decodes a format: a row for `TABLES` of src/tersor/layouts/decode_tables.py, and its cost.

    python bench/decode_tables.py fp6_e2m3 float16
    python bench/decode_tables.py --mask 0x8F808F80 --seconds 60

To add a table: `tersor doctor` says of a format that it has "no decode table" for a target. Run this for the format and
the target (float16, bfloat16, float8_e4m3fn or int8), enter the row that it prints, and run tests/unit/test_layouts.py,
tests/unit/test_decode_header.py and tests/compile. A mask stands for all formats whose bits lie in the same places of a
register, so a row may serve several.

Each register of a decode group is the XOR of up to three rotated words under the mask; with a shift two registers come
of one such XOR (kernels/cuda/common/decode.cuh). The matrix over GF(2) that leads from packed bits to decoded ones must
be regular, or codes could not be packed. A table's cost is counted in instructions: one for each rotation used, one for
each register, one more where three words are XORed, one for each shift, and those of the XOR of all words.

Annealing: from a regular table of rows with many terms, one row is changed at a time. A change that the cost allows is
made if the matrix stays regular. How unit vectors are sums of the matrix's rows (its inverse) is kept up to date, so
that only a matrix with as many rows as the table's row has bits decides that.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tersor import formats
from tersor.errors import FormatError
from tersor.layouts import decode_groups, decode_tables
from tersor.layouts.decode_groups import DecodeGroup, Finish

HOT, COLD = 0.4, 0.15
"""Temperatures at the start and at the end of an annealing, in instructions."""
MOST_TERMS = 3
LONG_ROW = 4
"""Cost of each further term: rows may have them on the way, not at the end."""


@dataclass(frozen=True, slots=True)
class Table:
    """A decode table.

    Attributes:
        mask: where the bits of codes stand in a register.
        shift: 0, or the left shift that gives the second register of a row.
        words: packed words in a decode group.
        rows: (word, left rotation) of the terms of each row; word `words` is the XOR of all.
    """

    mask: int
    shift: int
    words: int
    rows: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cost(self) -> int:
        """Instructions that decode a group."""
        used = {term for row in self.rows for term in row}
        rotations = sum(turn != 0 for _, turn in used)
        of_all = math.ceil((self.words - 1) / 2) if any(word == self.words for word, _ in used) else 0
        return rotations + of_all + sum(_row_cost(len(row), bool(self.shift)) for row in self.rows)

    @property
    def text(self) -> str:
        """The table as an entry of `TABLES`."""
        names = [*(chr(ord("A") + word) for word in range(self.words)), "X"]
        rows = " ".join("^".join(f"{names[word]}{turn}" for word, turn in row) for row in self.rows)
        return f'0x{self.mask:08X}: ({self.shift}, "{rows}"),'

    @property
    def group(self) -> DecodeGroup:
        """The decode group that the table makes, of bits alone."""
        terms = tuple((*(n for term in row for n in term), *((-1, 0) * (MOST_TERMS - len(row)))) for row in self.rows)
        return DecodeGroup(
            words=self.words,
            registers=32 * self.words // self.mask.bit_count(),
            mask=self.mask,
            shift=self.shift,
            raised=0,
            terms=terms,
            finish=Finish.AS_IS,
            constant=0,
            exponent=0,
            operand="float16",
        )

    @property
    def is_regular(self) -> bool:
        """Whether every pattern of packed bits decodes to another one, so that whatever is wanted can be packed."""
        return _Search(self.mask, self.shift, random.Random(0)).start([_numbers(row) for row in self.rows])


def in_tree(mask: int) -> Table | None:
    """Return the table that `decode_tables` has for a mask, if any."""
    if mask not in decode_tables.TABLES:
        return None
    words, shift, terms = decode_tables.TABLES[mask]
    rows = tuple(
        tuple((word, turn) for word, turn in zip(row[::2], row[1::2], strict=True) if word >= 0) for row in terms
    )
    return Table(mask, shift, words, rows)


def group_words(mask: int) -> int:
    """Return the words of a decode group: the fewest for whole pairs of k16 steps, or whole k32 steps of bytes."""
    multiple = 4 if mask == (mask & 0xFF) * 0x01010101 else 8
    return next(words for words in range(1, 9) if 32 * words % (multiple * mask.bit_count()) == 0)


def shifts(mask: int) -> list[int]:
    """Return 0 and the shifts by which a word's bits below the mask give a second register."""
    lowest = (mask & -mask).bit_length() - 1
    return [0, *(shift for shift in range(1, lowest + 1) if not mask & mask >> shift)]


def search(mask: int, seconds: float, seed: int = 0, enough: int = 0) -> Table:
    """Return the cheapest table found for a mask; an annealing of each possible shift in turn, longer every time.

    Args:
        mask: where the bits of codes stand in a register: two halves, or four bytes, that are alike.
        seconds: when to stop, or as soon after that as there is a table.
        seed: of the random choices.
        enough: cost at which to stop at once.
    """
    rng, best = random.Random(seed), None
    end, steps = time.monotonic() + seconds, 10_000
    while True:
        for shift in shifts(mask):
            found = _Search(mask, shift, rng).anneal(steps, end)
            if found is not None and (best is None or found.cost < best.cost):
                best = found
            if best is not None and (best.cost <= enough or time.monotonic() > end):
                return best
        steps *= 2


def _row_cost(terms: int, shifted: bool) -> int:
    """Instructions of a row beside its rotations: XOR of up to three values, of which the mask is one, are one."""
    return (3 if shifted else 1) + (terms > 2) + LONG_ROW * max(0, terms - MOST_TERMS)


def _numbers(row: Sequence[tuple[int, int]]) -> list[int]:
    return [32 * word + turn for word, turn in row]


def _add(pivots: dict[int, tuple[int, int]], value: int, own: int) -> bool:
    """Reduce a vector by the pivots and keep what is left as one more; tell whether anything was left.

    Vectors are bits of a number. A pivot stands under its highest bit, with the bits of the vectors that it is a sum
    of: `own` for this one.
    """
    while value:
        top = value.bit_length() - 1
        if top not in pivots:
            pivots[top] = (value, own)
            return True
        value ^= pivots[top][0]
        own ^= pivots[top][1]
    return False


class _Search:
    """One table under change, with the inverse of its matrix. A term is a number: 32 * word + rotation."""

    def __init__(self, mask: int, shift: int, rng: random.Random) -> None:
        self.mask, self.shift, self.rng = mask, shift, rng
        self.words = group_words(mask)
        self.bits = 32 * self.words
        places = [bit for bit in range(32) if mask >> bit & 1]
        self.places = [*places, *(place - shift for place in places)] if shift else places
        self.count = self.bits // len(self.places)  # rows
        self.all_words = self.words if self.words > 1 else 0  # the XOR of one word is that word
        self.of_all = math.ceil((self.words - 1) / 2)
        # The packed bits that each term brings to each place.
        self.units = [
            [
                [32 * one + (place - term) % 32 for one in (range(self.words) if word == self.words else (word,))]
                for place in self.places
            ]
            for word in range(self.words + 1)
            for term in range(32)
        ]

    def start(self, rows: list[list[int]]) -> bool:
        """Take rows as they are; tell whether their matrix is regular."""
        self.rows = rows
        pivots: dict[int, tuple[int, int]] = {}
        for index, vector in enumerate(vector for row in rows for vector in self.vectors(row)):
            if not _add(pivots, vector, 1 << index):
                return False
        if len(pivots) != self.bits:
            return False
        # Each unit vector as a sum of the matrix's rows, from the lowest up: a pivot's other bits are below it.
        self.inverse: list[int] = []
        for bit in range(self.bits):
            value, own = pivots[bit]
            value ^= 1 << bit
            while value:
                top = value.bit_length() - 1
                own ^= self.inverse[top]
                value ^= 1 << top
            self.inverse.append(own)
        self.uses = [0] * len(self.units)
        for row in rows:
            for term in row:
                self.uses[term] += 1
        return True

    def vectors(self, row: list[int]) -> list[int]:
        """Return the rows of the matrix that a row of the table stands for, bits of packed words."""
        found = []
        for place in range(len(self.places)):
            vector = 0
            for term in row:
                for unit in self.units[term][place]:
                    vector ^= 1 << unit
            found.append(vector)
        return found

    def change_of_cost(self, old: list[int], new: list[int]) -> int:
        """Return how many instructions more a table has with a row changed."""
        shifted = bool(self.shift)
        change = _row_cost(len(new), shifted) - _row_cost(len(old), shifted)
        for term in set(old).difference(new):
            change -= term % 32 != 0 and self.uses[term] == 1
        for term in set(new).difference(old):
            change += term % 32 != 0 and self.uses[term] == 0
        first = 32 * self.words
        before, after = sum(term >= first for term in old), sum(term >= first for term in new)
        if before != after and self.of_all:
            total = sum(self.uses[first:])
            change += self.of_all * ((total - before + after > 0) - (total > 0))
        return change

    def try_row(self, index: int, new: list[int]) -> bool:
        """Change a row if the matrix stays regular; tell whether it did."""
        width = len(self.places)
        low, field = index * width, (1 << width) - 1
        sums, pivots = [], {}
        for place in range(width):
            total = 0
            for term in new:
                for unit in self.units[term][place]:
                    total ^= self.inverse[unit]
            if not _add(pivots, total >> low & field, 1 << place):
                return False
            sums.append(total & ~(field << low))
        # What stands for each old row of the matrix: new ones of this table row, and with them rows of others.
        instead: list[int] = []
        for bit in range(width):
            value, own = pivots[bit]
            value ^= 1 << bit
            combined = own << low
            for place in range(width):
                if own >> place & 1:
                    combined ^= sums[place]
            while value:
                top = value.bit_length() - 1
                combined ^= instead[top]
                value ^= 1 << top
            instead.append(combined)
        for unit, total in enumerate(self.inverse):
            old = total >> low & field
            if old:
                total ^= old << low
                while old:
                    top = old.bit_length() - 1
                    total ^= instead[top]
                    old ^= 1 << top
                self.inverse[unit] = total
        for term in self.rows[index]:
            self.uses[term] -= 1
        for term in new:
            self.uses[term] += 1
        self.rows[index] = new
        return True

    def random_term(self) -> int:
        """Return any term, or often one that costs nothing: not rotated, or used elsewhere."""
        rng = self.rng
        if rng.random() < 0.6:
            if rng.random() < 0.4:
                return 32 * rng.randrange(self.words)
            row = self.rows[rng.randrange(len(self.rows))]
            return row[rng.randrange(len(row))]
        return 32 * rng.randrange(self.words + (self.words > 2)) + rng.randrange(32)

    def changed(self, row: list[int]) -> list[int]:
        """Return a row with a term more, fewer or other."""
        rng, new = self.rng, list(row)
        kind = rng.random()
        if len(new) > 1 and kind < 0.25:
            del new[rng.randrange(len(new))]
            return new
        term = self.random_term()
        if term in new:
            return row
        if kind < 0.45 and len(new) < MOST_TERMS:
            new.append(term)
        else:
            new[rng.randrange(len(new))] = term
        return new

    def anneal(self, steps: int, end: float) -> Table | None:
        """Return the cheapest table of an annealing; `None` where none had rows short enough."""
        rng = self.rng
        while not self.start([self._long_row() for _ in range(self.count)]):
            pass
        cost = self._table().cost
        best = None
        for step in range(steps):
            if step % 1024 == 0 and best is not None and time.monotonic() > end:
                break
            temperature = HOT * (COLD / HOT) ** (step / steps)
            index = rng.randrange(self.count)
            row = self.rows[index]
            new = self.changed(row)
            change = self.change_of_cost(row, new)
            if new == row or (change > 0 and rng.random() >= math.exp(-change / temperature)):
                continue
            if self.try_row(index, new):
                cost += change
                if (best is None or cost < best.cost) and all(len(row) <= MOST_TERMS for row in self.rows):
                    best = self._table()
        return best

    def _long_row(self) -> list[int]:
        return self.rng.sample(range(32 * self.words), self.rng.randint(5, 8))  # odd numbers, too: else all is even

    def _table(self) -> Table:
        rows = tuple(tuple(divmod(term, 32) for term in row) for row in self.rows)
        return Table(self.mask, self.shift, self.words, rows)


def masks(name: str, target: str) -> list[int]:
    """Return the masks for a format beside activations of a dtype: one, or one for each 8-bit float it fits in.

    Raises:
        FormatError: unknown names, or a format whose codes do not fit.
    """
    if target not in decode_groups.TARGETS:
        raise FormatError(f"unknown target {target!r}: use {', '.join(decode_groups.TARGETS)}")
    fmt = formats.get(name)
    found = [decode_groups._mask(fmt, operand) for operand in decode_groups._OPERANDS[target]]
    if not any(found):
        raise FormatError(f"the bits of {name} do not fit in a register of {target}")
    return [mask for mask in found if mask]


def main() -> None:
    """Read the command line, search, print the table found beside the one in the tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", nargs="?", help="an element format, such as fp6_e2m3")
    parser.add_argument("target", nargs="?", default="float16", help="dtype of the activations; default: float16")
    parser.add_argument("--mask", type=lambda text: int(text, 0), help="where the bits of codes stand in a register")
    parser.add_argument("--seconds", type=float, default=120.0, help="time for each mask; default: 120")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if (arguments.format is None) == (arguments.mask is None):
        parser.error("name a format or a mask")
    try:
        wanted = masks(arguments.format, arguments.target) if arguments.format else [arguments.mask]
    except FormatError as error:
        parser.error(str(error))
    for mask in wanted:
        found, before = search(mask, arguments.seconds, arguments.seed), in_tree(mask)
        print(found.text)
        print(f"    {found.cost} instructions, {'no table before' if before is None else f'{before.cost} in the tree'}")


if __name__ == "__main__":
    main()
