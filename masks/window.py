"""The window: the rule of the layer, in integers and in words.

Query ``i`` stands in window ``w = i // size``. It sees the keys of its own window, of the
``look_backward`` windows before it and of the ``look_forward`` windows after it. ``causal`` ends
the interval at the query; ``exact`` makes it slide with the query. All arithmetic of windows is
here.

Source: the documented ``LocalAttention`` of https://github.com/lucidrains/local-attention.
"""

import math
from dataclasses import dataclass

from ..torch_limits.sizes import Index, plain_int
from .arguments import check_count, check_flag, kind_of, plain
from .rule import Entry, Reach, Rule

_MOST_SPAN = 2**62  # positions are int64


@dataclass(frozen=True)
class Window(Rule):
    """Which keys each query sees.

    Args:
        size: tokens in a window, at least 1.
        causal: a query sees no key after itself.
        look_backward: windows before its own that a query sees, at least 0.
        look_forward: windows after its own that a query sees; ``None`` means 0 when causal and
            1 otherwise; must be 0 when causal.
        exact: the interval slides with the query, ``look_backward * size`` keys back and (when
            not causal) ``look_forward * size`` keys ahead, the query's own key besides.

    The bounds take and give token positions, as ints or integer tensors, and are not clipped to
    the sequence: ``first_key(0)`` may be negative.

    Raises:
        ValueError: a number out of range, or ``look_forward`` above 0 with ``causal``.
        TypeError: a number is no int, or a flag neither True nor False.
    """

    size: int
    causal: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        causal = check_flag("causal", self.causal)
        ahead = self.look_forward
        if ahead is None:
            ahead = 0 if causal else 1
        checked = {
            "size": plain_int(check_count("size", self.size)),
            "causal": causal,
            "look_backward": plain_int(check_count("look_backward", self.look_backward, least=0)),
            "look_forward": plain_int(check_count("look_forward", ahead, least=0)),
            "exact": check_flag("exact", self.exact),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.span > _MOST_SPAN:
            raise ValueError(
                "window size times the windows looked at must be at most 2**62 tokens, "
                f"got {self.size} times {1 + self.look_backward + self.ahead}"
            )
        if self.causal and self.ahead > 0:
            raise ValueError(
                f"look_forward must be 0 or None when causal is True, got {self.ahead}"
            )

    # The windows of others, in their words.

    @classmethod
    def sliding(cls, keys: int) -> "Window":
        """A query's own key and the ``keys - 1`` before it, as Mistral's ``sliding_window`` counts.

        Raises:
            ValueError, TypeError: ``keys`` is below 1, or no int.

        >>> Window.sliding(4096).words
        'a query sees at most 4096 keys: its own and the 4095 before it'
        """
        return cls._from_reach(check_count("keys", keys) - 1, 0)

    @classmethod
    def around(cls, reach: int) -> "Window":
        """``reach`` keys on each side and the query's own, as Longformer and ModernBERT count.

        Raises:
            ValueError, TypeError: ``reach`` is below 0, or no int.
        """
        reach = check_count("reach", reach, least=0)
        return cls._from_reach(reach, reach)

    @classmethod
    def left_right(cls, left: int, right: int) -> "Window":
        """``left`` keys before the query, ``right`` after it and its own.

        FlashAttention's ``window_size=(left, right)``, for numbers from 0 on.

        Raises:
            ValueError, TypeError: a number is below 0, or no int.
        """
        left, right = check_count("left", left, least=0), check_count("right", right, least=0)
        return cls._from_reach(left, right)

    @classmethod
    def chunked(cls, size: int) -> "Window":
        """The query's chunk of ``size`` tokens up to itself, as in Llama 4.

        Raises:
            ValueError, TypeError: ``size`` is below 1, or no int.
        """
        return cls(size, causal=True, look_backward=0)

    @classmethod
    def _from_reach(cls, before: int, after: int) -> "Window":
        """A window that slides: its size is the largest of which both numbers are multiples."""
        size = math.gcd(before, after) or 1
        return cls(size, after == 0, before // size, after // size, exact=True)

    @property
    def ahead(self) -> int:
        """``look_forward`` with its default filled in."""
        assert self.look_forward is not None
        return self.look_forward

    @property
    def before(self) -> int:
        """Tokens in the windows before a query's own that it looks at."""
        return self.look_backward * self.size

    @property
    def after(self) -> int:
        """Tokens in the windows after a query's own that it looks at."""
        return self.ahead * self.size

    @property
    def span(self) -> int:
        """Keys in a query's own window and all the windows it looks at."""
        return self.before + self.size + self.after

    def span_start(self, query: Index) -> Index:
        """First key of the windows that ``query`` looks at: where its ``span`` keys begin."""
        return (query // self.size - self.look_backward) * self.size

    def first_key(self, query: Index) -> Index:
        """First key that ``query`` sees."""
        return self._back(query, self.look_backward, self.exact)

    def last_key(self, query: Index) -> Index:
        """Last key that ``query`` sees."""
        return self._forth(query, self.ahead, self.exact or self.causal)

    def first_query(self, key: Index) -> Index:
        """First query that sees ``key``."""
        return self._back(key, self.ahead, self.exact or self.causal)

    def last_query(self, key: Index) -> Index:
        """Last query that sees ``key``."""
        return self._forth(key, self.look_backward, self.exact)

    def keys(self, batch: Entry, head: Entry, query: Index) -> tuple[Index, Index]:
        """``first_key`` and ``last_key``, the same for every batch entry and head."""
        return self.first_key(query), self.last_key(query)

    def queries(self, batch: Entry, head: Entry, key: Index) -> tuple[Index, Index]:
        """``first_query`` and ``last_query``, the same for every batch entry and head."""
        return self.first_query(key), self.last_query(key)

    def hides_nothing(self, n: int) -> bool:
        """Whether each of ``n`` tokens sees all, but for later ones where it is ``causal``."""
        sees_first = self.first_key(n - 1) <= 0
        return bool(sees_first and (self.causal or self.last_key(0) >= n - 1))

    @property
    def reach(self) -> Reach:
        """What follows from the numbers alone."""
        within = 0 if self.exact else self.size - 1  # keys of its own window on one side, at most
        return Reach(
            keys=self.most_seen,
            back=self.before + within,
            ahead=self.after + (0 if self.causal else within),
            label=self.label,
            align=self.size,
            step=1 if self.exact else self.size,
        )

    @property
    def window(self) -> "Window":
        """Itself."""
        return self

    @property
    def by_head(self) -> bool:
        """No."""
        return False

    def block_margin(self, block: int) -> int:
        """Upper bound of how far outside its query's ``span`` a key may lie that kernels score.

        Where a query of one block sees a key of another, kernels score all pairs of the two blocks.
        """
        # Up to a block from the key that is seen, and up to some windows of the query that sees it.
        return block + (-(-(block - 1) // self.size) * self.size if self.size % block else 0)

    @property
    def words(self) -> str:
        """How many keys a query sees, in words."""
        if self.exact:
            parts = ["its own"]
            before, after = f"the {self.before} before it", f"the {self.after} after it"
        else:
            parts = [f"its window of {self.size}" + (" up to itself" if self.causal else "")]
            before = f"{_windows(self.look_backward)} before"
            after = f"{_windows(self.ahead)} after"
        if self.look_backward:
            parts.append(before)
        if self.ahead:
            parts.append(after)
        return f"a query sees at most {_keys(self.most_seen)}: {_listed(parts)}"

    @property
    def most_seen(self) -> int:
        """Most keys that a query sees; those far from both ends of the sequence see as many."""
        if self.exact:
            return self.before + 1 + self.after
        return self.span

    @property
    def label(self) -> str:
        """The parameters as an identifier, for names of mask_mods, pictures and benchmarks."""
        flags = ("_causal" if self.causal else "") + ("_exact" if self.exact else "")
        return f"window_{self.size}_back_{self.look_backward}_forward_{self.ahead}{flags}"

    def __repr__(self) -> str:
        return (
            f"Window(size={self.size}, causal={self.causal}, look_backward={self.look_backward}, "
            f"look_forward={self.look_forward}, exact={self.exact}): {self.words}"
        )

    # Each of the four bounds either slides with the token or lies at the edge of a window.

    def _back(self, token: Index, windows: int, slides: bool) -> Index:
        if slides:
            return token - windows * self.size
        return (token // self.size - windows) * self.size

    def _forth(self, token: Index, windows: int, slides: bool) -> Index:
        if slides:
            return token + windows * self.size
        return (token // self.size + windows + 1) * self.size - 1


def as_rule(given: object, name: str = "window") -> Rule:
    """``given``; an int is the size of a window that looks one back and one forward.

    Raises:
        TypeError: it is neither; ``name`` is what the caller's argument is called.
        ValueError: the size is below 1.
    """
    if isinstance(given, Rule):
        return given
    given = plain(given)
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(
            f"{name} must be a Window, another Rule or an int, got {given!r} of {kind_of(given)}"
        )
    return Window(check_count(name, given))


def _keys(count: int) -> str:
    return "1 key" if count == 1 else f"{count} keys"


def _windows(count: int) -> str:
    return "1 window" if count == 1 else f"{count} windows"


def _listed(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
