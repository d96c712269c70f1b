"""The same work on several boards at once, over SSH."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from edgesd.errors import (
    BoardError,
    EdgesdError,
    InputError,
    LinkError,
    UsageError,
    missing_package,
)
from edgesd.remote.board import Address, Board, parse_address
from edgesd.remote.ssh import connect

T = TypeVar("T")


def on_each(
    hosts: Sequence[str],
    work: Callable[[Board], Awaitable[T]],
    retries: int = 0,
    on_retry: Callable[[str, BoardError], None] | None = None,
) -> dict[str, T | EdgesdError]:
    """Host -> the result of `work` there, or why it failed. Connected to all of them at once.

    hosts: user@host[:port]. retries: how often `work` is begun again, after a pause that grows from
    1 s to 30 s, when the link to a board that was reached is lost; on_retry is called. A fault on
    one board, whatever it is, doesn't touch the others; Ctrl-C ends the work on all. Raises
    UsageError for a malformed or a repeated host, before any is asked.
    """
    addresses = [parse_address(host) for host in hosts]
    if len(set(addresses)) < len(addresses):
        raise UsageError("a board is named twice: name each once")

    async def one(address: Address) -> T | EdgesdError:
        reached = False
        for attempt in range(retries + 1):
            try:
                async with connect(address) as board:
                    reached = True
                    return await work(board)
            except LinkError as exc:
                if attempt == retries or not reached:
                    return exc
                if on_retry:
                    on_retry(str(address), exc)
                await asyncio.sleep(min(30, 2**attempt))
            except EdgesdError as exc:
                return exc
            except BrokenPipeError:  # the output is closed: there's no more to do
                raise
            except OSError as exc:  # a file or the disk of this machine: the link's are LinkErrors
                fault = InputError(f"{exc.filename or address}: {exc.strerror or exc}")
                fault.__cause__ = exc
                return fault
            except ModuleNotFoundError as exc:
                return missing_package(exc) or _internal_fault(address, exc)
            except Exception as exc:  # noqa: BLE001  whatever it is, the other boards go on
                return _internal_fault(address, exc)
        raise AssertionError("unreachable")

    async def all_of_them() -> list[T | EdgesdError]:
        return await asyncio.gather(*map(one, addresses))

    return dict(zip(map(str, addresses), asyncio.run(all_of_them()), strict=True))


def _internal_fault(address: Address, error: Exception) -> BoardError:
    fault = BoardError(f"{address}: internal fault: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault
