"""Train the bundled model from scratch: `python -m models.train`.

The bundled weights come from two runs (20 and 5 minutes on two CPU cores; `torch.compile` needs
a C++ compiler): `python -m models.train --out FIRST`, then
`python -m models.train --start FIRST --steps 120`.
"""

import math
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from models import corpus

END, SYSTEM, USER, ASSISTANT = "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"
VOCABULARY = 4096
CONTEXT = 2048  # tokens
TOKENS_PER_STEP = 4096
SHORT, MIDDLE, LONG = 256, 512, 2048  # tokens a row
LONG_SHARE = 0.08  # of the steps from scratch: the last ones
FIRST_RATE, SECOND_RATE, WARM_UP = 3e-3, 1e-3, 100
COMPILE_FROM = 1000  # steps: compiling takes a minute for each row length
REPORT_EVERY = 10  # steps

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
{{- '<|endoftext|>' if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{{- '<|assistant|>\\n' if add_generation_prompt -}}
"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from `texts`: any Unicode text survives the way there and back."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(end: int) -> LlamaForCausalLM:
    """An untrained model of 5.5 million parameters; `end` is the end-of-text token's id."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """One vector of token ids for each text."""
    return [torch.tensor(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def batches(texts: list[torch.Tensor], length: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless (TOKENS_PER_STEP / length, length) batches; texts and rows shuffled every epoch."""
    size = TOKENS_PER_STEP // length
    while True:
        order = torch.randperm(len(texts), generator=rng).tolist()
        stream = torch.cat([texts[i] for i in order])
        rows = stream[: len(stream) // length * length].view(-1, length)
        rows = rows[torch.randperm(len(rows), generator=rng)]
        yield from rows[: len(rows) // size * size].view(-1, size, length)


def chat_batches(chats: list[torch.Tensor], rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless (TOKENS_PER_STEP / SHORT, SHORT) batches; every row begins with a conversation."""
    rows: list[torch.Tensor] = []
    row = torch.empty(0, dtype=torch.long)
    while True:
        for i in torch.randperm(len(chats), generator=rng).tolist():
            row = torch.cat([row, chats[i]])
            if len(row) >= SHORT:
                rows.append(row[:SHORT])
                row = row[:0]
            if len(rows) == TOKENS_PER_STEP // SHORT:
                yield torch.stack(rows)
                rows.clear()


def first_run(
    texts: list[torch.Tensor], steps: int, rng: torch.Generator
) -> Iterator[torch.Tensor]:
    """From scratch: short rows, which are the quickest to learn from, and long ones at the end."""
    long_steps = round(steps * LONG_SHARE)
    yield from islice(batches(texts, SHORT, rng), steps - long_steps)
    yield from islice(batches(texts, LONG, rng), long_steps)


def second_run(
    texts: list[torch.Tensor], chats: list[torch.Tensor], steps: int, rng: torch.Generator
) -> Iterator[torch.Tensor]:
    """For a trained model: conversations from position 0 on, middle and long rows in turn."""
    middle, long = batches(texts, MIDDLE, rng), batches(texts, LONG, rng)
    turns = zip(chat_batches(chats, rng), middle, long, strict=False)
    yield from islice(chain.from_iterable(turns), steps)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, texts: list[torch.Tensor]) -> float:
    """Mean loss in nats per token, over windows of 512 tokens."""
    total = count = 0
    for window in torch.cat(texts).split(512):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=window[None], labels=window[None]).loss
        total += loss.item() * (len(window) - 1)
        count += len(window) - 1
    return total / count


def fit(
    model: LlamaForCausalLM,
    data: Iterator[torch.Tensor],
    steps: int,
    rate: float,
    console: Console,
) -> None:
    """Train in place: AdamW, warm-up and cosine, bfloat16 products on float32 weights."""
    forward = torch.compile(model, dynamic=False) if steps > COMPILE_FROM else model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARM_UP, steps // 10), steps)

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tok/s"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    task = progress.add_task("training", total=steps, loss=math.nan, speed=0)
    smooth, began, marked = math.nan, time.monotonic(), time.monotonic()
    with progress:
        for step, batch in enumerate(data, start=1):
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            elapsed = time.monotonic() - began
            progress.update(task, advance=1, loss=smooth, speed=step * TOKENS_PER_STEP / elapsed)
            if not console.is_terminal and (step % REPORT_EVERY == 0 or step == steps):
                now = time.monotonic()
                speed = ((step - 1) % REPORT_EVERY + 1) * TOKENS_PER_STEP / (now - marked)
                left = (steps - step) * elapsed / step / 60
                marked = now
                console.print(
                    f"step {step}/{steps}  loss {smooth:.3f}  {speed:,.0f} tok/s  "
                    f"{left:.1f} min left"
                )


def train(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("models/tiny"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of 4,096 tokens.")] = 2000,
    start: Annotated[
        Path | None, typer.Option(help="Go on from this model, instead of from scratch.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the text's order and the chats.")] = 0,
) -> None:
    """Train the bundled model on the running Python's standard library."""
    console = Console(highlight=False, soft_wrap=True)
    torch.manual_seed(seed)
    began = time.monotonic()

    plain, held_out = corpus.documents()
    tokenizer = make_tokenizer(plain)
    conversations = corpus.conversations(seed)
    chats = encode(
        tokenizer, [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    )
    texts = encode(tokenizer, [text + END for text in plain]) + chats
    test = encode(tokenizer, [text + END for text in held_out])
    console.print(
        f"{len(plain)} documents, {len(chats)} chats, {sum(map(len, texts)):,} tokens; held out "
        f"{len(test)} modules, {sum(map(len, test)):,} tokens"
    )

    model = make_model(tokenizer.eos_token_id)
    size = sum(parameter.numel() for parameter in model.parameters())
    before = held_out_loss(model, test)
    console.print(f"{size:,} parameters; untrained, held out: {before:.3f} nats/token")
    rng = torch.Generator().manual_seed(seed)
    if start is None:
        fit(model, first_run(texts, steps, rng), steps, FIRST_RATE, console)
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        fit(model, second_run(texts, chats, steps, rng), steps, SECOND_RATE, console)

    model.eval().to(torch.bfloat16)
    after = held_out_loss(model, test)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    # The name this class had before transformers 5, which reads it too.
    settings.write_text(
        settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    )
    to_bits_per_byte = sum(map(len, test)) / sum(len(t.encode()) for t in held_out) / math.log(2)
    console.print(
        f"held-out loss: untrained {before:.3f} nats/token ({before * to_bits_per_byte:.2f} "
        f"bits/byte), trained {after:.3f} ({after * to_bits_per_byte:.2f}); "
        f"{(time.monotonic() - began) / 60:.1f} min, written to {out}"
    )


if __name__ == "__main__":
    typer.run(train)
