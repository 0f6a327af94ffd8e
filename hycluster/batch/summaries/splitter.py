"""A text of any length, cut into parts of at most so many tokens, at the best boundaries there are.

The text is first cut into small pieces at the ends of sentences and lines, and each piece's tokens
are counted. Parts are packed from pieces: each ends at the highest boundary of its second half (a
heading before a paragraph, a line, a sentence, a word, a character). Then the parts themselves are
counted, since tokens of pieces do not add up exactly, and the few over the bound are cut again. So
all work is linear in the text: the tokenizer sees each character about twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import regex

from hycluster.errors import InvalidInput

# Number of tokens of each text, special ones not counted.
CountTokens = Callable[[Sequence[str]], Sequence[int]]

# Characters of a piece. Larger ones leave fewer places to cut at, smaller ones make the sum of their counts less exact.
LONGEST_PIECE = 500
# Most tokens of a character in a tokenizer that falls back on bytes.
CHARACTER_TOKENS = 4
# Pieces that the tokenizer gets in one call.
COUNTED_AT_ONCE = 2048
# How far around a cut characters that are drawn as one are looked for.
CLUSTER_WINDOW = 64


class Boundary(IntEnum):
    """What lies between two pieces; the higher, the better to cut there."""

    CHARACTER = 0
    WORD = 1
    SENTENCE = 2
    LINE = 3
    PARAGRAPH = 4
    HEADING = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Characters ``start`` to ``end`` of a text, and how far before them its overlap begins.

    Attributes:
        context_start: where the overlap with what comes before begins; ``start`` if there is none.
        tokens: of ``text[context_start:end]``.
    """

    start: int
    end: int
    context_start: int
    tokens: int


@dataclass(slots=True)
class _Piece:
    """``boundary`` is the one at its end."""

    start: int
    end: int
    boundary: Boundary
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part before it is counted: pieces ``first`` to ``last``, without ``last``."""

    first: int
    last: int
    context_start: int


# Starts and ends are such that a run of one kind of character is never scanned twice.
_BREAK = re.compile(
    r"\n(?:[ \t\r]*+\n\s*+)?"
    r"|(?<![.!?…])[.!?…]++[\"'”’)\]]*+[ \t]++(?![a-z])"
    r"|(?<![。！？])[。！？]++[”’」』）】]*+"
)
_WORD_END = re.compile(r"\s+|[,;:，、；：]+")
# Markdown's, and "Chapter 3", "第三章", "第12回" and their like.
_HEADING = re.compile(
    r"#{1,6} |(?:chapter|part|section|book)\s+[\dIVXLC]+\b|第\s*[\d〇零一二三四五六七八九十百千]+\s*[章节節回卷部篇]",
    re.IGNORECASE,
)
_CLUSTER = regex.compile(r"\X")


def split_text(text: str, count: CountTokens, max_tokens: int, overlap_tokens: int = 0) -> list[Part]:
    """Cut a text into parts. Every character lies in exactly one part, overlaps aside.

    Args:
        count: the model's tokenizer; called with many short texts at once.
        max_tokens: most tokens of a part, its overlap included.
        overlap_tokens: most tokens before a part's start that are told again with it.

    Returns:
        Parts in order; none for an empty text. The same arguments give the same parts.

    Raises:
        InvalidInput: the overlap is more than half of a part, or a single character is more than a part may be.
    """
    if not 0 <= overlap_tokens <= max_tokens // 2:
        raise InvalidInput(
            f"overlap_tokens: {overlap_tokens} is not allowed; must be from 0 to half of a part's {max_tokens} tokens"
        )
    pieces = _pieces(text, count, max_tokens - overlap_tokens)
    drafts = []
    for first, last in _pack(pieces, 0, len(pieces), max_tokens - overlap_tokens):
        drafts.append(_Draft(first, last, _context_start(text, count, pieces, first, overlap_tokens)))
    parts = []
    while drafts:
        again = []
        tokens = _counted(count, [text[draft.context_start : pieces[draft.last - 1].end] for draft in drafts])
        for draft, found in zip(drafts, tokens, strict=True):
            start = pieces[draft.first].start
            if found <= max_tokens:
                parts.append(Part(start, pieces[draft.last - 1].end, draft.context_start, found))
            elif draft.context_start < start:
                again.append(_Draft(draft.first, draft.last, start))
            else:
                # More than one piece: one alone was counted already, and was small enough.
                total = sum(piece.tokens for piece in pieces[draft.first : draft.last])
                cut = _best_end(pieces, draft.first, draft.last - 1, total // 2)
                again += [_Draft(draft.first, cut, start), _Draft(cut, draft.last, pieces[cut].start)]
        drafts = again
    return sorted(parts, key=lambda part: part.start)


def _pieces(text: str, count: CountTokens, max_tokens: int) -> list[_Piece]:
    """The whole text as pieces of at most so many tokens, counted."""
    longest = max(2, min(max_tokens // CHARACTER_TOKENS, LONGEST_PIECE))
    pieces = [piece for long in _sentences(text, longest // 4) for piece in _cut_long(text, long, longest)]
    done: list[_Piece] = []
    while pieces:
        over = False
        for piece, tokens in zip(pieces, _counted(count, [text[p.start : p.end] for p in pieces]), strict=True):
            piece.tokens = tokens
            over |= tokens > max_tokens
        if not over:
            done += pieces
            break
        # Rare: mostly where a bound of few tokens meets characters that are several each.
        fine, halves = [], []
        for piece in pieces:
            if piece.tokens <= max_tokens:
                fine.append(piece)
                continue
            if piece.end - piece.start == 1:
                raise InvalidInput(
                    f"part_tokens: {max_tokens} is not allowed; the character at {piece.start} alone has {piece.tokens}"
                )
            middle, boundary = _middle(text, piece.start, piece.end)
            halves += [_Piece(piece.start, middle, boundary), _Piece(middle, piece.end, piece.boundary)]
        done += fine
        pieces = halves
    done.sort(key=lambda piece: piece.start)
    return done


def _sentences(text: str, shortest: int) -> Iterator[_Piece]:
    """Sentences and lines; neighbours shorter than ``shortest`` characters become one piece."""
    start = 0
    for match in _BREAK.finditer(text):
        end = match.end()
        boundary = Boundary.SENTENCE
        if text[match.start()] == "\n":
            boundary = Boundary.LINE if text.find("\n", match.start() + 1, end) < 0 else Boundary.PARAGRAPH
            if _HEADING.match(text, end):
                boundary = Boundary.HEADING
        if end < len(text) and (end - start >= shortest or boundary == Boundary.HEADING):
            yield _Piece(start, end, boundary)
            start = end
    if start < len(text):
        yield _Piece(start, len(text), Boundary.HEADING)


def _cut_long(text: str, piece: _Piece, longest: int) -> Iterator[_Piece]:
    """A piece as pieces of at most so many characters, between words where there are any."""
    start = piece.start
    while piece.end - start > longest:
        end, boundary = start + longest, Boundary.WORD
        words = [match.end() for match in _WORD_END.finditer(text, start + longest // 2, end)]
        if words:
            end = words[-1]
        else:
            end, boundary = _between_clusters(text, start, end), Boundary.CHARACTER
        yield _Piece(start, end, boundary)
        start = end
    yield _Piece(start, piece.end, piece.boundary)


def _middle(text: str, start: int, end: int) -> tuple[int, Boundary]:
    """A place to cut near the middle, at least one character from both ends."""
    middle, reach = (start + end) // 2, (end - start) // 4
    words = [match.end() for match in _WORD_END.finditer(text, middle - reach, middle + reach)]
    if words:
        return min(words, key=lambda word: abs(word - middle)), Boundary.WORD
    return _between_clusters(text, start, middle), Boundary.CHARACTER


def _between_clusters(text: str, start: int, end: int) -> int:
    """The last place after ``start`` and not after ``end`` that does not tear an accent or a joined emoji off.

    ``end`` itself where there is none near.
    """
    window = max(start, end - CLUSTER_WINDOW)
    for match in _CLUSTER.finditer(text, window, end + CLUSTER_WINDOW):
        if match.end() > end:
            return match.start() if match.start() > window else end
        if match.end() == end:
            return end
    return end


def _counted(count: CountTokens, texts: Sequence[str]) -> list[int]:
    return [
        tokens
        for first in range(0, len(texts), COUNTED_AT_ONCE)
        for tokens in count(texts[first : first + COUNTED_AT_ONCE])
    ]


def _pack(pieces: Sequence[_Piece], first: int, last: int, budget: int) -> Iterator[tuple[int, int]]:
    """Runs of pieces of at most ``budget`` tokens."""
    while first < last:
        end, tokens = first, 0
        while end < last and tokens + pieces[end].tokens <= budget:
            tokens += pieces[end].tokens
            end += 1
        if end < last:
            end = _best_end(pieces, first, end, budget // 2)
        yield first, end
        first = end


def _best_end(pieces: Sequence[_Piece], first: int, last: int, fewest_tokens: int) -> int:
    """The highest boundary after ``fewest_tokens`` and after at least one piece, up to ``last``; the latest of equals.

    ``last`` must be more than ``first``; it is the end where all before it are fewer tokens.
    """
    best, tokens = last, 0
    found = Boundary.CHARACTER
    for end in range(first + 1, last + 1):
        tokens += pieces[end - 1].tokens
        if tokens >= fewest_tokens and pieces[end - 1].boundary >= found:
            best, found = end, pieces[end - 1].boundary
    return best


def _context_start(text: str, count: CountTokens, pieces: Sequence[_Piece], first: int, overlap_tokens: int) -> int:
    """Where an overlap of at most so many tokens with what comes before a piece begins: at a high boundary."""
    start = pieces[first].start
    if not first or not overlap_tokens:
        return start
    best, found, tokens = first, Boundary.CHARACTER, 0
    for begin in range(first - 1, -1, -1):
        tokens += pieces[begin].tokens
        if tokens > overlap_tokens:
            break
        boundary = pieces[begin - 1].boundary if begin else Boundary.HEADING
        if best == first or boundary >= found or tokens < overlap_tokens // 2:
            best, found = begin, boundary
    if best < first:
        return pieces[best].start
    # The last sentence alone is too long: its end will do.
    begin = pieces[first - 1].start
    while start - begin > 1:
        begin, _ = _middle(text, begin, start)
        if count([text[begin:start]])[0] <= overlap_tokens:
            return begin
    return start
