"""A WebSocket server and client of another stack (websockets)."""

import asyncio
import sys
import time

from websockets.asyncio.client import connect
from websockets.asyncio.server import serve


async def echo(connection):
    async for message in connection:
        await connection.send(message)


async def run_server(port_file):
    async with serve(echo, "127.0.0.1", 0) as server:
        with open(port_file, "w", encoding="ascii") as file:
            file.write(str(server.sockets[0].getsockname()[1]))
        await asyncio.get_running_loop().create_future()


async def chat(address, seconds):
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = await connect(f"ws://{address}/", proxy=None)
            break
        except Exception:  # the service may still be on its way to this cluster
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    async with connection:
        end = time.monotonic() + seconds
        count = 0
        while time.monotonic() < end:
            text = f"message {count}"
            await connection.send(text)
            answer = await asyncio.wait_for(connection.recv(), 5)
            assert answer == text, answer
            count += 1
            await asyncio.sleep(0.1)
    print(f"{count} messages over one connection")


if sys.argv[1] == "serve":
    asyncio.run(run_server(sys.argv[2]))
else:
    asyncio.run(chat(sys.argv[2], float(sys.argv[3])))
