# SPDX-License-Identifier: Apache-2.0
"""What `generate` knows of the tokens to come, and whether tiles pay for them."""

from dataclasses import dataclass


DECODE_CACHES = ("auto", "history", "online")

# Tokens of a whole sequence from which on tiles are taken: behind as many, steps of a whole model are faster by them
# (benchmarks/bench_generate.py, section `online`). A few new ones do not pay for them.
CROSSOVER, FEW = 2048, 16


@dataclass(frozen=True)
class Plan:
    """The generation that a cache is for.

    Attributes:
        decode_cache: As in `HyenaConfig`; None: what the config says.
        new: Tokens to come behind the prompt; None: not known.
        ends: Whether the cache dies with this generation, single tokens following the prompt.
    """

    decode_cache: str | None = None
    new: int | None = None
    ends: bool = False

    def __post_init__(self) -> None:
        if self.decode_cache is not None and self.decode_cache not in DECODE_CACHES:
            raise ValueError(
                f"decode_cache of the generation config is {self.decode_cache!r}; choose one of "
                f"{', '.join(DECODE_CACHES)}"
            )

    def takes_tiles(self, decode_cache: str, expected: int | None) -> bool:
        """Whether tiles serve a cache.

        Args:
            decode_cache: Of the config.
            expected: Tokens of the whole sequence; None: not known.
        """
        choice = self.decode_cache or decode_cache
        if choice == "auto":
            return self.new is not None and expected is not None and self.new >= FEW and expected >= CROSSOVER
        return choice == "online"


__all__ = ["DECODE_CACHES", "Plan"]
