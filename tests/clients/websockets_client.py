"""Python's websockets as a device."""

import asyncio
import json
import os
import signal
import sys

import websockets
from websockets.asyncio.client import connect
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

URL = os.environ["CLIENTS_URL"]
APP = os.environ["CLIENTS_APP"]
DEADLINE = 60  # seconds a check may take
BODIES = {
    "ASCII": "Closing early today",
    "4096 characters of CJK": "廣播訊息" * 1024,
    "4-byte UTF-8": "🦀😀𝄞🎉" * 1024,
}

CHECKS = []


def check(name):
    """Adds a check; they run in the order of the file."""

    def add(body):
        CHECKS.append((name, body))
        return body

    return add


def login(since=0):
    """The first message of a device; `since` is its cursor."""
    fields = {"type": "login", "app": APP, "account": "ada", "device": "d1", "platform": "web", "since": since}
    return json.dumps(fields | {"token": os.environ["CLIENTS_TOKEN"]})


def connected(**options):
    # No proxy of the environment stands between, and the client's own pings are not what is looked at.
    return connect(URL, proxy=None, ping_interval=None, **options)


async def welcome(device):
    message = json.loads(await device.recv())
    assert message["type"] == "welcome" and message["head"] >= 1 and message["session"], message
    return message


async def log_in(device, since=0):
    await device.send(login(since))
    return await welcome(device)


async def broadcast(body, *more):
    """Broadcasts; the id."""
    process = await asyncio.create_subprocess_exec(
        os.environ["CLIENTS_BINARY"], "send", "--url", os.environ["CLIENTS_HTTP"], "--app", APP,
        "--secret-file", os.environ["CLIENTS_SECRET_FILE"], "--body", body, *more,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    answer = json.loads((await process.communicate())[0])
    assert answer["code"] == 200, answer
    return answer["msg"]["broadcastId"]


async def close_of(device):
    """The close frame that comes next."""
    try:
        message = await device.recv()
    except ConnectionClosed as closed:
        assert closed.rcvd is not None, "no close frame came"
        return closed.rcvd
    raise AssertionError(f"instead of a close: {message:.100}")


async def fails(device, code):
    """The device is told what is wrong, and then closed."""
    message = json.loads(await device.recv())
    assert message["type"] == "error" and message["code"] == 414, message
    close = await close_of(device)
    assert close.code == code, close


@check("a login is welcomed")
async def _():
    async with connected() as device:
        await log_in(device)


@check("permessage-deflate is offered and not negotiated")
async def _():
    async with connected(compression="deflate") as device:
        assert "permessage-deflate" in device.request.headers["Sec-WebSocket-Extensions"]
        assert "Sec-WebSocket-Extensions" not in device.response.headers
        assert device.protocol.extensions == []
        await log_in(device)


for name, body in BODIES.items():

    @check(f"a live broadcast arrives whole: {name}")
    async def _(body=body):
        async with connected() as device:
            await log_in(device)
            id = await broadcast(body)
            message = json.loads(await device.recv())
            assert (message["type"], message["id"]) == ("broadcast", id), message
            assert message["content"] == body, "another content"


for payload in [b"", bytes(range(255, 130, -1))]:

    @check(f"a ping of {len(payload)} bytes is answered with the same")
    async def _(payload=payload):
        async with connected() as device:
            await log_in(device)
            # The library takes no other pong for its answer.
            await (await device.ping(payload))


@check("a login in fragments")
async def _():
    async with connected() as device:
        text = login()
        await device.send([text[:9], "", text[9:40], text[40:]])
        await welcome(device)


@check("a login in segments of 1 byte")
async def _():
    async with connected() as device:
        for byte in Frame(Opcode.TEXT, login().encode()).serialize(mask=True):
            device.transport.write(bytes([byte]))
            await asyncio.sleep(0.002)
        await welcome(device)


@check("a device that answers the pings stays")
async def _():
    async with connected() as device:
        await log_in(device)
        # One that does not is cut off after 6 of them.
        try:
            async with asyncio.timeout(9):
                raise AssertionError(f"came: {await device.recv():.100}")
        except TimeoutError:
            await (await device.ping())


for code in [1000, 1001, 3000, 4999]:

    @check(f"a close with {code} is answered with the same")
    async def _(code=code):
        async with connected() as device:
            await log_in(device)
            await device.close(code, "gone, as said")
            close = await close_of(device)
            assert close.code == code, close


@check("a text after the login: error 414, close 1008")
async def _():
    async with connected() as device:
        await log_in(device)
        await device.send("hello")
        await fails(device, 1008)


@check("a text that is no login: error 414, close 1008")
async def _():
    async with connected() as device:
        await device.send("x" * 4096)
        await fails(device, 1008)


@check("a binary login: 1003")
async def _():
    async with connected() as device:
        await device.send(login().encode())
        await fails(device, 1003)


@check("a login that is not masked: 1002")
async def _():
    async with connected() as device:
        device.transport.write(Frame(Opcode.TEXT, login().encode()).serialize(mask=False))
        await fails(device, 1002)


for data in [b"\xff", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe6\xbc"]:

    @check(f"a text that is not UTF-8 ({data.hex(' ')}): 1007")
    async def _(data=data):
        async with connected() as device:
            await device.send(data, text=True)
            await fails(device, 1007)


@check("a login of 4097 bytes: 1009")
async def _():
    async with connected() as device:
        await device.send("x" * 4097)
        await fails(device, 1009)


@check("another Sec-WebSocket-Version: 426")
async def _():
    class Older(ClientProtocol):
        def connect(self):
            request = super().connect()
            del request.headers["Sec-WebSocket-Version"]
            request.headers["Sec-WebSocket-Version"] = "8"
            return request

    uri = parse_uri(URL)
    reader, writer = await asyncio.open_connection(uri.host, uri.port)
    protocol = Older(uri)
    protocol.send_request(protocol.connect())
    for data in protocol.data_to_send():
        writer.write(data)
    protocol.receive_data(await reader.read())
    protocol.receive_eof()
    writer.close()
    error = protocol.handshake_exc
    assert isinstance(error, InvalidStatus) and error.response.status_code == 426, error
    assert error.response.headers["Sec-WebSocket-Version"] == "13", error.response.headers


@check("retained broadcasts come at login, by the cursor")
async def _():
    texts = ["kept: 一", "kept: 二"]
    ids = [await broadcast(text, "--offline") for text in texts]
    for since, first in [(0, 0), (ids[0], 1), (ids[1], 2)]:
        async with connected() as device:
            welcomed = await log_in(device, since)
            assert (welcomed["head"], welcomed["pending"]) == (ids[1], 2 - first), welcomed
            for id, text in list(zip(ids, texts))[first:]:
                message = json.loads(await device.recv())
                assert (message["type"], message["id"], message["content"]) == ("broadcast", id, text), message


@check("the server drains: 1012 and when to come back")
async def _():
    async with connected() as device:
        await log_in(device, 2**53 - 1)
        os.kill(int(os.environ["CLIENTS_SERVER"]), signal.SIGTERM)
        close = await close_of(device)
        assert close.code == 1012, close
        assert json.loads(close.reason)["reconnectAfterMs"] > 0, close


async def main():
    failed = 0
    for name, body in CHECKS:
        try:
            async with asyncio.timeout(DEADLINE):
                await body()
            print(f"ok      websockets: {name}", flush=True)
        except Exception as error:  # whatever it is, the check has failed, and the next one is made
            failed += 1
            print(f"FAIL    websockets: {name}: {error or type(error).__name__}"[:300], flush=True)
    print(f"websockets {websockets.__version__}: {len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


sys.exit(asyncio.run(main()))
