"""Ask a dashboard for its websocket as a browser does, which names the page's origin."""

from __future__ import annotations

from typing import Any

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

REFUSED = 403
NOT_THERE = 404
ACCEPTED = 101


def handshake(client: Any, base: str, page: str, origin: str) -> int:
    """Return the HTTP status with which the websocket of a page is opened, or refused."""

    async def ask() -> int:
        url = f"{base}/{page}/ws".replace("http:", "ws:")
        try:
            connection = await websocket_connect(HTTPRequest(url, headers={"Origin": origin}))
        except HTTPClientError as error:
            return int(error.code)
        connection.close()
        return ACCEPTED

    status: int = client.sync(ask)
    return status
