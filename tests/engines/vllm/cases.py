"""ENGINE_ARGS as Tripod takes them, beside what a user of `vllm serve` types for the same."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models import lora
from tests.engines.vllm.faked_platform import CPU, Machine
from tests.support import MODEL, ROOT

PLUGIN = """
from vllm.{module} import {manager}
from {base} import {parser}

@{manager}.register_module("of_a_user")
class OfAUser({parser}):
    pass
"""


@dataclass
class Case:
    """
    Args:
        engine_args: what Tripod is given.
        options: what `vllm serve` is given.
        settings: Tripod's other settings.
        following: options that tell `vllm serve` what Tripod departs in, so that what only follows
            from a departure is equal.
        on_cpu: more of those, on a CPU alone.
        refused: a part of the sentence that both refuse it with.
    """

    name: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    options: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    folder: str = MODEL
    following: str = ""
    on_cpu: str = ""
    refused: str = ""

    def task(self, told: str = "") -> dict[str, Any]:
        given = {"engine_args": self.engine_args, "mode_to_run": "serverless", **self.settings}
        return asdict(self) | {"options": shlex.split(f"{self.options} {told}"), "settings": given}

    def told_on(self, machine: Machine) -> str:
        return self.following + (f" --enforce-eager {self.on_cpu}" if machine == CPU else "")


def cases(folder: Path, machine: Machine) -> list[Case]:
    """All of one machine; `folder` gets the files that they name."""
    template, tools, reasoning, long = _files(folder)
    known = _known(folder)
    fits = "--max-model-len 25000"
    found = [
        Case("nothing"),
        Case("a longer model", folder=long, following=fits),
        Case(
            "a known family",
            folder=known,
            following="""--enable-auto-tool-choice --tool-call-parser hermes
            --reasoning-parser qwen3""",
        ),
        Case(
            "a known family, switched off",
            {"enable_auto_tool_choice": False, "reasoning_parser": None},
            folder=known,
        ),
        Case(
            "a known family, pooling",
            {"runner": "pooling", "convert": "embed"},
            "--runner pooling --convert embed",
            folder=known,
        ),
        Case("a name", settings={"model": "org/name"}),
        Case("api mode", settings={"mode_to_run": "api"}),
        Case("auto", settings={"concurrency_modifier": "auto"}),
        Case("fp8", {"quantization": "fp8"}, "--quantization fp8"),
        Case("fp8 KV cache", {"kv-cache-dtype": "fp8"}, "--kv-cache-dtype fp8"),
        *_lora(folder),
        Case(
            "speculative",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
            "--speculative-config.method ngram --speculative-config.num_speculative_tokens 3",
        ),
        Case(
            "chat template",
            {
                "chat_template": template,
                "chat_template_content_format": "string",
                "default_chat_template_kwargs": {"enable_thinking": False},
            },
            f"""--chat-template {template} --chat-template-content-format string
            --default-chat-template-kwargs '{{"enable_thinking": false}}'""",
        ),
        Case(
            "parsers",
            {
                "enable_auto_tool_choice": True,
                "tool_call_parser": "hermes",
                "reasoning_parser": "qwen3",
            },
            "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3",
        ),
        Case(
            "parser plugins",
            {"tool_parser_plugin": tools, "reasoning_parser_plugin": reasoning},
            f"--tool-parser-plugin {tools} --reasoning-parser-plugin {reasoning}",
        ),
        Case("no prefixes", {"enable_prefix_caching": False}, "--no-enable-prefix-caching"),
        Case(
            "pooling",
            {
                "runner": "pooling",
                "convert": "embed",
                "pooler_config": {"pooling_type": "MEAN"},
                "enable_flash_late_interaction": False,
            },
            """--runner pooling --convert embed --pooler-config '{"pooling_type": "MEAN"}'
            --no-enable-flash-late-interaction""",
        ),
        Case(
            "batches",
            {"max_num_seqs": 33, "max_num_batched_tokens": "4K", "async_scheduling": False},
            "--max-num-seqs 33 --max-num-batched-tokens 4K --no-async-scheduling",
        ),
        Case(
            "compilation",
            {"compilation_config": {"mode": 3, "cudagraph_capture_sizes": [1, 2, 4]}},
            """--compilation-config '{"mode": 3, "cudagraph_capture_sizes": [1, 2, 4]}'""",
        ),
        Case(
            "HTTP",
            {"allowed_origins": ["https://a"], "middleware": ["a.b", "c.d"], "root_path": "/x"},
            """--allowed-origins '["https://a"]' --middleware a.b --middleware c.d
            --root-path /x""",
        ),
        Case(
            "what is logged",
            {
                "enable_log_requests": True,
                "aggregate_engine_logging": True,
                "disable_log_stats": False,
                "max_log_len": 7,
            },
            "--enable-log-requests --aggregate-engine-logging --max-log-len 7",
        ),
        Case(
            "metrics of a request",
            {"enable_per_request_metrics": True},
            "--enable-per-request-metrics",
        ),
        *_refused(),
    ]
    for gpus in machine.parallel[1:]:
        size, option = {"tensor_parallel_size": gpus}, f"--tensor-parallel-size {gpus}"
        found.append(Case(f"TP {gpus}", size, option, folder=long, following=fits))
        fp8, typed = {"kv_cache_dtype": "fp8"}, f"{option} --kv-cache-dtype fp8"
        found.append(Case(f"TP {gpus}, fp8 KV", size | fp8, typed, folder=long, following=fits))
    if len(machine.parallel) > 1:
        devices = {"tensor_parallel_size": 2, "device_ids": [0, 1]}
        found.append(Case("two of them", devices, "--tensor-parallel-size 2 --device-ids 0,1"))
        size, option = {"data_parallel_size": 2}, "--data-parallel-size 2"
        found.append(Case("data parallel", size, option))
    return found


def _lora(folder: Path) -> list[Case]:
    paths = [lora.make(folder / f"rank-{rank}", rank=rank) for rank in (8, 20)]
    modules = [{"name": path.name, "path": os.path.relpath(path, ROOT)} for path in paths]
    typed = " ".join(f"'{json.dumps(module)}'" for module in modules)
    given = {"enable_lora": True, "lora_modules": modules}
    return [
        Case(
            "LoRA",
            given,
            f"--enable-lora --lora-modules {typed}",
            following="--max-lora-rank 32",
            on_cpu="--max-loras 3",
        ),
        Case(
            "LoRA as the user has it",
            {**given, "max_lora_rank": 64, "max-loras": 5},
            f"--enable-lora --max-lora-rank 64 --max-loras 5 --lora-modules {typed}",
        ),
    ]


def _refused() -> list[Case]:
    return [
        Case(
            "tools without a parser",
            {"enable_auto_tool_choice": True},
            "--enable-auto-tool-choice",
            refused="--enable-auto-tool-choice requires --tool-call-parser",
        ),
        Case(
            "outputs without requests",
            {"enable_log_outputs": True},
            "--enable-log-outputs",
            refused="--enable-log-outputs requires --enable-log-requests",
        ),
        Case(
            "no such template",
            {"chat_template": "/nowhere/template"},
            "--chat-template /nowhere/template",
            refused="/nowhere/template",
        ),
        Case(
            "no number",
            {"max_num_seqs": "many"},
            "--max-num-seqs many",
            refused="argument --max-num-seqs: ",
        ),
    ]


def _files(folder: Path) -> tuple[str, str, str, str]:
    """A template, two plugins, and a model of which only the configuration is there."""
    template, tools, reasoning = (folder / name for name in ("a.jinja", "tools.py", "reasoning.py"))
    template.write_text("{{ messages[0].content }}")
    tools.write_text(
        PLUGIN.format(
            module="tool_parsers",
            manager="ToolParserManager",
            base="vllm.tool_parsers.hermes_tool_parser",
            parser="Hermes2ProToolParser",
        )
    )
    reasoning.write_text(
        PLUGIN.format(
            module="reasoning",
            manager="ReasoningParserManager",
            base="vllm.reasoning.deepseek_r1_reasoning_parser",
            parser="DeepSeekR1ReasoningParser",
        )
    )
    long = folder / "long"
    long.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (long / name).write_bytes((Path(MODEL) / name).read_bytes())
    config = json.loads((Path(MODEL) / "config.json").read_text(encoding="utf-8"))
    wide = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048}
    config |= wide | {"max_position_embeddings": 131072}
    (long / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(template), str(tools), str(reasoning), str(long)


def _known(folder: Path) -> str:
    """What says that it is a Qwen3 that thinks; vLLM looks at no more than its architecture."""
    known = folder / "known"
    known.mkdir(exist_ok=True)
    config = json.loads((Path(MODEL) / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "qwen3"}
    (known / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (known / name).write_bytes((Path(MODEL) / name).read_bytes())
    (known / "chat_template.jinja").write_text(
        "{% if tools %}within <tool_call></tool_call>: {{ tools | tojson }}{% endif %}"
        "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    return str(known)
