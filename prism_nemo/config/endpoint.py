"""Settings of chat-completions endpoints: a judge of answers, a teacher of demonstrations and the prompts for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prism_nemo.config.enums import Benchmark
from prism_nemo.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass
class EndpointConfig:
    """An OpenAI-compatible chat-completions endpoint, and what it may cost."""

    base_url: str | None = None  # without /chat/completions, mostly ending in /v1; https, or http on this machine
    model: str | None = None  # the model's name at the endpoint
    api_key_env: str | None = None  # the environment variable that holds the key; null: none is sent
    allow_http: bool = False  # http to other machines too: whoever is on the way reads key, prompts and images
    temperature: float = 1.0  # 0: the likeliest answer
    max_tokens: int | None = 8192  # of one answer; null: the endpoint's own limit
    extra_body: dict[str, Any] = field(default_factory=dict)  # further fields of every request, in the endpoint's own words
    max_concurrency: int = 8  # requests under way at a time, in every process that asks
    timeout_seconds: float = 120.0  # of one attempt, from connecting to the last byte of the answer
    max_attempts: int = 6  # at one request: after busy, failing and silent servers, and broken connections
    backoff_seconds: float = 1.0  # before the second attempt, doubled with each up to a minute; a server may ask for longer
    max_response_bytes: int = 4194304  # a longer answer is refused
    max_requests: int | None = None  # attempts that may be sent, over all runs that share cache_dir; null: no limit
    max_prompt_tokens: int | None = None  # by the endpoint's own count, over all runs that share cache_dir; null: no limit
    max_completion_tokens: int | None = None  # likewise
    max_cost: float | None = None  # likewise, by the two prices; null: no limit
    prompt_price: float = 0.0  # of a million prompt tokens, in any currency
    completion_price: float = 0.0  # of a million completion tokens
    cache_dir: str | None = None  # answers that are paid for, and what they cost; runs may share it; null: teacher/ of the run
    cache_as: str | None = None  # stands for base_url in the cache, where the same model is served at changing addresses


@dataclass
class JudgeConfig(EndpointConfig):
    """A language model that says whether an answer which the rules call wrong means the verified one after all."""

    enabled: bool = False  # ask it
    temperature: float = 0.0  # 0: the likeliest verdict
    max_tokens: int | None = 16  # of a verdict, which is one word; more for a model that thinks first
    max_answer_length: int = 2000  # characters; a longer answer is not shown to the judge
    cache_dir: str | None = None  # verdicts that are paid for, and what they cost; needed, runs may share it


@dataclass
class CurationConfig:
    """Which prompts the teacher is asked, and how often."""

    unsolved_only: bool = True  # only prompts that the policy fails at; false: all, and no policy is needed
    pass_rates: str | None = None  # pass_rates.jsonl of an earlier run, instead of sampling from the policy
    max_solved_share: float = 0.0  # of the policy's tries; prompts that it solves more often are left out
    max_answers: int = 4  # the teacher's, to one prompt, until one is right
    system_prompt: str | None = None  # what the teacher is told; null: data.system_prompt
    image_max_pixels: int | None = None  # larger images are sent to the teacher scaled down; null: as they are
    exclude: list[str] = field(
        default_factory=list
    )  # benchmarks, whose prompts and images are left out: files of records, or mathvista:PATH
    deduplicate: bool = True  # of records with the same prompt and images, as near as below, keep the first
    min_similarity: float = 0.8  # of the word triples of two prompts (Jaccard) that count as the same; 1: only equal triples
    max_image_distance: int = 6  # bits of 256 in which two pictures' brightness gradients may differ; 0 still sees re-encoding
    exclude_min_words: int = 12  # a shorter benchmark prompt is left out only where the images are the same too


def check_endpoint(config: EndpointConfig, section: str) -> None:
    """Raises ConfigError for an address that cannot be asked or a budget that cannot be kept; no message shows the address."""
    for key in ("base_url", "model"):
        if not getattr(config, key):
            raise ConfigError("the endpoint is not given", where=f"{section}.{key}", remedy=f"set {section}.{key}")
    _check_address(config, f"{section}.base_url")
    if config.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.api_key_env):
        raise ConfigError(
            "this is not the name of an environment variable",  # and may be the key itself, so it is not shown
            where=f"{section}.api_key_env",
            remedy="export the key in a variable, and give the variable's name here",
        )
    if isinstance(config, JudgeConfig) and config.cache_dir is None:
        raise ConfigError(
            "it is not said where verdicts are kept, so that none is paid for twice",
            where=f"{section}.cache_dir",
            remedy=f"set {section}.cache_dir=FOLDER; runs may share it, and then share its budget",
        )
    if config.max_cost is not None and not config.prompt_price and not config.completion_price:
        raise ConfigError(
            "a limit of cost needs prices",
            where=f"{section}.max_cost",
            remedy=f"set {section}.prompt_price and {section}.completion_price, of a million tokens",
        )
    reserved = {"model", "messages", "temperature", "max_tokens", "seed", "stream", "n"} & config.extra_body.keys()
    if reserved:
        raise ConfigError(
            f"`{min(reserved)}` has a key of its own, or is set by this program",
            where=f"{section}.extra_body",
            remedy="leave it out of extra_body",
        )


def _check_address(config: EndpointConfig, where: str) -> None:
    try:
        address = urlsplit(config.base_url or "")
        host, _ = address.hostname, address.port
    except ValueError as error:
        raise ConfigError("the address is not a URL", where=where, remedy="for example https://host/v1") from error
    if address.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f\x7f]", config.base_url or ""):
        raise ConfigError("the address is not an http or https URL", where=where, remedy="for example https://host/v1")
    if address.username is not None or address.password is not None or address.query or address.fragment:
        raise ConfigError(
            "the address holds a user, a password, a query or a fragment, which would be written into the run's files",
            where=where,
            remedy="give the bare address, and the key in the environment variable that api_key_env names",
        )
    if address.scheme == "http" and host not in LOOPBACK and not config.allow_http:
        raise ConfigError(
            "http to another machine would send key, prompts and images unencrypted",
            where=where,
            remedy=f"use https, or {where.rpartition('.')[0]}.allow_http=true on a network that you trust",
        )


def check_curation(config: CurationConfig, policy: str) -> None:
    """Raises ConfigError where it is not said how unsolved prompts are found, and for files that are not there."""
    if config.unsolved_only and config.pass_rates is None and not policy:
        raise ConfigError(
            "there is no policy whose failures could be looked for",
            where="model.path",
            remedy="set model.path, or curate.pass_rates=FILE of an earlier run, or curate.unsolved_only=false",
        )
    if config.pass_rates is not None and not Path(config.pass_rates).is_file():
        raise ConfigError("the file does not exist", where=f"curate.pass_rates: {config.pass_rates}", remedy="check the path")
    for entry in config.exclude:
        benchmark, path = excluded(entry)
        if not (path.is_file() or (benchmark is not None and path.is_dir())):
            names = ", ".join(Benchmark.__members__)
            raise ConfigError(
                "the file does not exist",
                where=f"curate.exclude: {entry}",
                remedy=f"a file of records, or NAME:PATH of a published benchmark's file or folder (NAME: {names})",
            )


def excluded(entry: str) -> tuple[Benchmark | None, Path]:
    """What an entry of `curate.exclude` names: a benchmark's published files, or (None, …) a file of our own records."""
    name, colon, path = entry.partition(":")
    return (Benchmark[name], Path(path)) if colon and name in Benchmark.__members__ else (None, Path(entry))
