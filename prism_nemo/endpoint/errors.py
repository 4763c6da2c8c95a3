"""What can go wrong between this program and an endpoint."""

from __future__ import annotations

from prism_nemo.errors import PrismError


class EndpointError(PrismError):
    """The endpoint cannot be asked: wrong key or address, no permission, or failing for as long as it was tried."""


class RefusedRequest(EndpointError):
    """The endpoint refuses this one request, or answers it with more than may be read; others may be fine."""


class BudgetExhausted(PrismError):
    """As much was asked as the configuration allows. What was answered is in the cache, so a later run goes on from there."""


class TransientError(Exception):
    """An attempt that is worth another one. `retry_after`: seconds that the server asks to wait."""

    def __init__(self, what: str, *, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.retry_after = retry_after


class Stopped(Exception):
    """Nothing more is sent, as the program was told to stop."""
