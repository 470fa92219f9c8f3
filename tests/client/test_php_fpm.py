"""The PHP client in PHP-FPM, behind Caddy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest
import trio

from tests.kit.clients import subscribe, websocket
from tests.kit.fake_daemon import listening
from tests.kit.handshakes import get
from tests.kit.patience import PATIENCE
from tests.kit.php import CLIENT, NOT_LOOKING
from tests.kit.stack import Daemon, PhpFpm, running_caddy, running_php_fpm


async def test_a_page_broadcasts_through_php_fpm(runtime_dir: Path, daemon: Daemon, php_fpm: PhpFpm) -> None:
    app = runtime_dir / "app"
    app.mkdir()
    (app / "index.php").write_text(
        f"<?php require_once '{CLIENT}';\n"
        "broadcast('news', $_GET['message']);\n"
        "$client = new Realtime\\Client();\n"
        "try { $client->broadcast('news', \"\\xff\"); }\n"
        "catch (Realtime\\RefusedException $error) { echo $error->getErrorCode(); }\n"
    )
    async with (
        running_caddy(
            runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=php_fpm.socket, app=app
        ) as caddy,
        websocket(daemon.websocket_socket, subprotocols=["realtime.v1"]) as browser,
    ):
        with trio.fail_after(PATIENCE):
            await browser.send_message(subscribe("news"))
            events = [json.loads(await browser.get_message()) for _ in range(2)]
            assert [event["event"] for event in events] == ["welcome", "subscribed"]
            for message in ("one", "two"):
                answer = await get(caddy.port, f"/?message={message}")
                assert (answer.status, answer.body) == (200, "invalid_utf8")
                assert json.loads(await browser.get_message())["data"] == message


PAGE_UNDER_SETTINGS: Final = """<?php
require_once '{client}';
header('Content-Type: application/json');
for ($i = 0; $i < 1100; $i++) {{ $files[] = fopen('php://temp/maxmemory:0', 'r+'); fwrite(end($files), 'x'); }}
$said = [];
foreach (['{daemon}', '{left}', '{file}', '{missing}'] as $socket) {{
    $client = new Realtime\\Client($socket);
    try {{ $said[] = [$client->broadcast('news', 'hello')->recipients, $client->broadcast('news', 'x')->recipients]; }}
    catch (Realtime\\RealtimeException $error) {{ $said[] = $error->getMessage(); }}
}}
echo json_encode($said);
"""


@pytest.mark.parametrize("setting", NOT_LOOKING)
async def test_under_php_fpm_with_such_settings_and_many_open_files(
    runtime_dir: Path, daemon: Daemon, setting: str
) -> None:
    app = runtime_dir / "app"
    app.mkdir()
    left, file, missing = (runtime_dir / name for name in ("left.sock", "file.sock", "missing.sock"))
    with listening(left, backlog=1):
        pass
    file.touch()
    client = shutil.copy(CLIENT, app)
    (app / "index.php").write_text(
        PAGE_UNDER_SETTINGS.format(client=client, daemon=daemon.control_socket, left=left, file=file, missing=missing)
    )
    where = f"{app}:/tmp/php"  # the prefix of PHP's temporary files
    pool = [f"php_admin_value[{name}] = {value.format(client=where)}" for name, _, value in [setting.partition("=")]]
    async with (
        running_php_fpm(runtime_dir, pool_settings=[*pool, "rlimit_files = 4096"]) as fpm,
        running_caddy(runtime_dir, websocket_socket=daemon.websocket_socket, php_socket=fpm.socket, app=app) as caddy,
    ):
        with trio.fail_after(PATIENCE):
            answer = await get(caddy.port, "/")
    assert answer.status == 200
    said = json.loads(answer.body)
    nobody = "nothing listens there. The socket is left from a daemon that has ended, or the file is not a socket"
    assert said[:3] == [[0, 0], f"no daemon at {left}: {nobody}", f"no daemon at {file}: {nobody}"]
    assert said[3].startswith(f"no daemon at {missing}: there is no such file")
