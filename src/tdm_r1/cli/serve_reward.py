"""`tdm-r1 serve-reward`."""

from __future__ import annotations

import os
from dataclasses import dataclass

import tyro
from rich.console import Console
from tyro.conf import Positional

SERVED_AT_ONCE = 1024  # images that a served reward gets in one call; a client sends them in chunks of its own


@dataclass
class ServeReward:
    """Serves a reward over HTTP, for training elsewhere or in another environment.

    POST /score takes JSON with images (base64 PNG or raw arrays), prompts and metadata. Listening on anything but
    loopback needs a token in the environment variable TDM_R1_TOKEN, on both sides.
    """

    reward: Positional[str]
    """A name (`tdm-r1 rewards`) or my_rewards.py:function."""
    host: str = "127.0.0.1"
    port: int = 8000
    timeout: float = 600.0
    """Seconds that the reward may take for a request; then it is stopped and started again."""


def main(args: list[str]) -> int:
    """Serves a reward until Ctrl-C, in a process of its own: one that hangs or dies is started again."""
    command, console = tyro.cli(ServeReward, args=args, prog="tdm-r1 serve-reward"), Console()
    from ..rewards.http import TOKEN, RewardServer
    from ..rewards.registry import load_reward
    from ..rewards.workers import Workers

    name = command.reward
    reward = Workers(name, load_reward, processes=1, timeout=command.timeout, chunk=SERVED_AT_ONCE)
    try:
        server = RewardServer(name, reward, host=command.host, port=command.port, token=os.environ.get(TOKEN))
        reward.start()
        console.print(f"Serving {name} at {server.url}: train with --reward {server.url}. Ctrl-C ends it.")
        server.serve_forever()
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        reward.close()
    return 0
