"""A rollout server: an engine with a model of its own, whose weights come from the run that it serves.

    prism-nemo serve model.path=models/Qwen3-VL-8B rollout=vllm serve.port=8900

Runs with `rollout.placement=separate` start such servers themselves, or use those that they are named (docs/rollout_servers.md).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from prism_nemo.config.enums import Precision, RolloutEngineKind
from prism_nemo.config.schema import ParallelConfig, ServeConfig
from prism_nemo.config.validate import validate
from prism_nemo.convert.hf import hf_assets_directory, load_model_config
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.errors import ConfigError
from prism_nemo.models.base import build_chunks
from prism_nemo.models.policy import PolicyModel, PolicyModule
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import layer_kind
from prism_nemo.printable import PrintableFormatter
from prism_nemo.rollout.base import RolloutEngine, with_engine
from prism_nemo.rollout.server import TOKEN_VARIABLE, EngineHost, RolloutServer, token_from_environment
from prism_nemo.run_directory import resolve_model_directory

_CLOSING_SECONDS = 5.0


def run(config: ServeConfig) -> None:
    """The `serve` command: until SIGTERM, SIGINT, or the end of the run that started it."""
    validate(config)
    settings = config.serve
    token = token_from_environment()
    if token is None and not _is_loopback(settings.host):
        raise ConfigError(
            "other machines would reach the server without a token",
            where=f"serve.host: {settings.host}",
            remedy=f"set the environment variable {TOKEN_VARIABLE} to a secret, here and for the run, or serve.host=127.0.0.1",
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    parent = None if settings.parent_fd is None else _watch_parent(settings.parent_fd)
    with session(ParallelConfig(), config.runtime) as runtime:
        config.rollout = with_engine(config.rollout, runtime.device, 1)
        host = EngineHost(build_engine(config, runtime), name=config.rollout.engine.value, device=runtime.device)
        try:
            server = RolloutServer(
                host, (settings.host, settings.port), token=token, max_body_bytes=settings.max_request_mb << 20
            )
        except OSError as error:
            raise ConfigError(
                f"the server cannot listen: {error}", where=f"serve.port: {settings.port}", remedy="choose another port, or 0"
            ) from error
        with server:
            url = f"http://{_reachable_name(settings.host)}:{server.server_port}"
            print(f"rollouts by {config.rollout.engine} of {config.model.path} at {url}", file=sys.stderr, flush=True)
            if parent is not None:
                parent.sendall(json.dumps({"url": url, "instance": host.instance}).encode() + b"\n")
            _serve(server)
        if not host.close(_CLOSING_SECONDS):
            os._exit(1)  # what is being generated would be waited for, and nobody wants it any more


def build_engine(config: ServeConfig, runtime: Runtime) -> RolloutEngine:
    """The engine, on this rank alone, without weights."""
    path = resolve_model_directory(Path(config.model.path), PolicyModel.name)
    hf_config = load_model_config(path)
    if config.rollout.engine is RolloutEngineKind.vllm:
        from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

        dtype = torch.bfloat16 if config.model.precision is Precision.bf16 else torch.float32
        max_length = config.data.max_prompt_length + config.data.max_response_length
        return VLLMEngine(config.rollout, ServedModel(hf_assets_directory(path), hf_config, dtype, runtime.device, max_length))
    from prism_nemo.rollout.loading import ServedMegatronEngine
    from prism_nemo.rollout.stopping import Tokenizer

    shape, layers = Qwen3VLShape.from_hf(hf_config), layer_kind(config.model, runtime.device)
    with runtime.layout.active():
        chunks = build_chunks(
            lambda vp_stage: PolicyModule(shape, ParallelConfig(), config.model.precision, vp_stage=vp_stage, layers=layers),
            ParallelConfig(),
        )
    moved = [chunk.to(runtime.device) for chunk in chunks]
    return ServedMegatronEngine(
        moved,
        hf_config,
        device=runtime.device,
        max_batch_size=config.rollout.max_batch_size,
        decode=Tokenizer(hf_assets_directory(path)).decode,
    )


def _serve(server: RolloutServer) -> None:
    """Until a signal: `shutdown` waits for the loop that the signal interrupts, so that another thread calls it.

    A signal that was ignored when this process began stays so: a job script keeps its servers while the run saves.
    """

    def stop(*_: Any) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    heard = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, stop) for number in heard}
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _watch_parent(descriptor: int) -> socket.socket:
    """The run's end of this connection closes with it, however it ends; then this process ends too, and all that it started."""
    try:
        parent = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigError(
            "there is no run at the other end", where=f"serve.parent_fd: {descriptor}", remedy="leave it out: a run sets it"
        ) from error

    def watch() -> None:
        while parent.recv(1 << 10):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return parent


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reachable_name(host: str) -> str:
    """0.0.0.0 is no address that others could use."""
    return socket.gethostname() if host in ("0.0.0.0", "") else host
