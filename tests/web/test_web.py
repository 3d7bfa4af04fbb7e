"""What both servers ask of a request before they read it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.datastructures import Headers

from dither.errors import UsageError
from dither.serving.access import Access
from dither.web.access import bearer, host_of, is_address, is_loopback, is_of_another_page, is_one_of
from dither.web.body import TooLargeError, TooSlowError, limited
from dither.web.listening import in_url, listen


def headers(*pairs: tuple[str, str]) -> Headers:
    return Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in pairs])


def test_only_this_machine_is_loopback() -> None:
    """Whatever is not plainly loopback counts as reachable by others, and then a key or a token is asked for."""
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "localhost.example", "127.0.0.1.example", "[::1]", "LOCALHOST"):
        assert not is_loopback(host), host


def test_a_server_takes_the_spellings_of_an_address_that_people_type() -> None:
    for host in ("[::1]", "::1", "LocalHost"):
        assert not Access([], host, insecure=False).open_to_all
    with pytest.raises(UsageError, match="without a key"):
        Access([], "0.0.0.0", insecure=False)
    assert (in_url("::1"), in_url("[::1]"), in_url("127.0.0.1")) == ("[::1]", "[::1]", "127.0.0.1")


def test_a_host_is_one_and_numbers_are_told_from_names() -> None:
    assert host_of(headers(("host", "LOCALHOST:80"))) == "localhost:80"
    assert host_of(headers()) == host_of(headers(("host", "a"), ("host", "b"))) == ""
    assert is_address("[::1]") and is_address("10.0.0.1") and not is_address("10.0.0.1.example")


def test_the_origin_names_the_page() -> None:
    assert not is_of_another_page(headers(), "a:1")
    assert not is_of_another_page(headers(("origin", "http://a:1")), "a:1")
    for origin in ("https://a:1", "http://a:2", "http://a", "null", ""):
        assert is_of_another_page(headers(("origin", origin)), "a:1"), origin
    assert is_of_another_page(headers(("origin", "http://a:1"), ("origin", "http://b")), "a:1")
    assert not is_of_another_page(headers(("origin", "https://a:1")), "a:1", ("http", "https"))


def test_keys() -> None:
    assert bearer(headers(("authorization", "bearer  one "))) == "one"
    assert bearer(headers(("authorization", "Basic one"))) == bearer(headers()) == ""
    assert is_one_of("two", ["one", "two"]) and not is_one_of("three", ["one"]) and not is_one_of("", ["one"])
    assert not is_one_of("€", ["one"])


@pytest.mark.parametrize("length", ["11", "-1", "x", "", "²"])
def test_a_body_that_announces_too_much_is_not_waited_for(length: str) -> None:
    scope = {"type": "http", "headers": [(b"content-length", length.encode("latin-1"))]}
    with pytest.raises(TooLargeError):
        limited(scope, lambda: pytest.fail("it was read"), 10)


def test_a_body_that_announces_nothing_ends_at_the_limit() -> None:
    async def six() -> dict[str, Any]:
        return {"type": "http.request", "body": b"123456", "more_body": True}

    async def read() -> None:
        receive = limited({"type": "http", "headers": []}, six, 12)
        assert [len((await receive())["body"]) for _ in range(2)] == [6, 6]
        with pytest.raises(TooLargeError):
            await receive()

    asyncio.run(read())


def test_a_body_that_is_late_is_not_waited_for_and_silence_after_it_is() -> None:
    """The time is the body's alone: after it, one waits for the client to leave."""
    pieces: list[tuple[float, bytes, bool]] = [(0.0, b"a", True), (0.0, b"b", False), (0.3, b"", False)]

    async def receive() -> Any:
        seconds, body, more = pieces.pop(0)
        await asyncio.sleep(seconds)
        return {"type": "http.request", "body": body, "more_body": more}

    async def read(count: int, seconds: float) -> list[bytes]:
        counted = limited({"type": "http", "headers": []}, receive, 10, seconds)
        return [(await counted())["body"] for _ in range(count)]

    assert asyncio.run(read(3, 0.1)) == [b"a", b"b", b""]
    pieces[:] = [(0.0, b"a", True), (5.0, b"b", False)]
    with pytest.raises(TooSlowError) as caught:
        asyncio.run(read(2, 0.1))
    assert caught.value.status_code == 408


def test_a_process_that_is_started_later_does_not_get_the_socket() -> None:
    with listen("127.0.0.1", 0) as bound:
        assert not bound.get_inheritable()
        with pytest.raises(OSError):
            listen("127.0.0.1", bound.getsockname()[1])
