"""Mean, covariance and principal directions of vectors, as sums that merge."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of vectors, as sums that merge."""

    count: int
    mean: np.ndarray  # (n,)
    scatter: np.ndarray  # (n, n), Σ (v − mean)(v − mean)ᵀ

    @classmethod
    def of(cls, vectors: np.ndarray) -> "Moments":
        """Returns the moments of the rows of a float64 matrix."""
        if not len(vectors):
            n = vectors.shape[1]
            return cls(0, np.zeros(n), np.zeros((n, n)))
        mean = vectors.mean(axis=0)
        return cls(len(vectors), mean, (vectors - mean).T @ (vectors - mean))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        gap, weight = other.mean - self.mean, other.count / max(count, 1)
        scatter = self.scatter + other.scatter + self.count * weight * np.outer(gap, gap)
        return Moments(count, self.mean + weight * gap, scatter)

    @functools.cached_property
    def _eigh(self) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = np.linalg.eigh(self.scatter / max(self.count, 1))
        return values[::-1].clip(0), vectors[:, ::-1]

    @property
    def covariance(self) -> np.ndarray:
        """The covariance, (n, n), by the number of vectors."""
        return self.scatter / max(self.count, 1)

    @property
    def eigenvalues(self) -> np.ndarray:
        """Variances along the principal directions, (n,), largest first."""
        return self._eigh[0]

    @property
    def directions(self) -> np.ndarray:
        """The principal directions, the columns of an (n, n) matrix."""
        return self._eigh[1]

    @property
    def explained_variance(self) -> np.ndarray:
        """The part of the variance in the first 1, 2, … n directions, (n,); 1 if nothing varies."""
        sums = np.cumsum(self.eigenvalues)
        return sums / sums[-1] if sums[-1] else np.ones_like(sums)

    def directions_for(self, goal: float) -> int:
        """Returns how many directions explain this part of the variance."""
        return int(np.searchsorted(self.explained_variance, goal - 1e-12)) + 1
