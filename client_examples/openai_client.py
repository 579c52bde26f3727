"""Chat through the official OpenAI client: only its base URL and key differ."""

import argparse

from endpoint import Problem, address, parser, refusal, run
from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError


def chat(client: OpenAI, args: argparse.Namespace) -> None:
    """Print the model's turn, whole or as it comes."""
    model = args.model or client.models.list().data[0].id
    messages = [{"role": "user", "content": args.message}]
    asked = {"model": model, "messages": messages, "max_tokens": args.max_tokens}
    if not args.stream:
        print(client.chat.completions.create(**asked).choices[0].message.content)
        return
    chunk = None
    with client.chat.completions.create(**asked, stream=True) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
    if chunk is None:
        raise ValueError("a stream of nothing")
    print(flush=True)


def said(error: APIStatusError) -> str:
    """The endpoint's own words: what stands in "error", an object of OpenAI's or Runpod's text."""
    body = error.body
    return str(body.get("message") or "") if isinstance(body, dict) else str(body or "")


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("message", help="the user's turn")
    command_line.add_argument("--stream", action="store_true", help="print it as it comes")
    command_line.add_argument("--model", help="default: the first that the endpoint lists")
    command_line.add_argument("--max-tokens", type=int, default=256, help="default: 256")
    args = command_line.parse_args()
    url, key = address()

    try:
        with OpenAI(base_url=f"{url}/openai/v1", api_key=key) as client:
            chat(client, args)
    except APIStatusError as error:
        raise Problem(refusal(error.status_code, said(error)), error.status_code) from None
    except APIConnectionError as error:
        raise Problem(f"The endpoint cannot be reached: {error}") from None
    except OpenAIError as error:  # such as an error in the middle of a stream
        raise Problem(f"The endpoint broke off: {error}") from None
    except (ValueError, AttributeError, TypeError, IndexError):
        raise Problem("The answer is not OpenAI's; look at RUNPOD_BASE_URL.") from None


if __name__ == "__main__":
    run(main)
