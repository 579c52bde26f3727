// A whole answer, or with --stream one that is printed as it comes. Node 18 or newer, no packages.
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";

const HELP = `usage: node javascript.mjs [--stream] [--max-tokens N] PROMPT

environment:
RUNPOD_API_KEY       your key (required)
RUNPOD_ENDPOINT_ID   the endpoint's id (required)
RUNPOD_BASE_URL      default: https://api.runpod.ai/v2; the emulator: http://127.0.0.1:8008/v2`;
const RUNNING = ["IN_QUEUE", "IN_PROGRESS"];

function fail(sentence, code = 1) {
  console.error(sentence);
  process.exit(code);
}

function readArguments() {
  const options = {
    help: { type: "boolean", short: "h" },
    stream: { type: "boolean" },
    "max-tokens": { type: "string", default: "256" },
  };
  try {
    return parseArgs({ options, allowPositionals: true });
  } catch (error) {
    return fail(`${error.message}\n${HELP}`, 2);
  }
}

const { values, positionals } = readArguments();
if (values.help) {
  console.log(HELP);
  process.exit();
}
if (positionals.length !== 1) fail(HELP, 2);
const { RUNPOD_API_KEY: key, RUNPOD_ENDPOINT_ID: id, RUNPOD_BASE_URL: base } = process.env;
if (!key || !id) {
  fail("Set RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID in the environment; see --help.", 2);
}
if (!/^[!-~]+$/.test(key)) {
  fail("RUNPOD_API_KEY holds a space, a line break or another character no key has.", 2);
}
const url = `${(base || "https://api.runpod.ai/v2").replace(/\/+$/, "")}/${id}`;

function refusal(status) {
  if (status === 401 || status === 403) return "The endpoint does not accept this RUNPOD_API_KEY";
  if (status === 404) return "There is no such endpoint or job; look at RUNPOD_ENDPOINT_ID";
  if (status === 429) return "The endpoint has too many requests; try again later";
  if (status >= 500) return "The endpoint is in trouble; try again later";
  return "The endpoint refused the request";
}

async function call(path, body) {
  const headers = { Authorization: `Bearer ${key}`, "Content-Type": "application/json" };
  const request = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const reply = await fetch(`${url}/${path}`, request)
    .then(async (response) => ({
      ok: response.ok,
      status: response.status,
      text: await response.text(),
    }))
    .catch((error) => fail(`The endpoint cannot be reached: ${error.cause?.message ?? error.message}`));
  if (!reply.ok) fail(`${refusal(reply.status)} (HTTP ${reply.status}): ${reply.text}`);
  try {
    const answer = JSON.parse(reply.text);
    if (typeof answer === "object") return answer;
  } catch {} // told below, as any other answer that is no object
  return fail("The answer is not Runpod's; look at RUNPOD_BASE_URL.");
}

const input = {
  prompt: positionals[0],
  answerType: values.stream ? "stream" : "normal",
  options: { max_tokens: Number(values["max-tokens"]) },
};
let job = await call(values.stream ? "run" : "runsync", { input });
if (values.stream) {
  let news;
  let seen = 0; // characters, which are not what a string's length counts
  do {
    news = await call(`stream/${job.id}`);
    for (const { output } of news.stream) {
      // A chunk that may have come already says by its offset where its text belongs.
      const text = [...output.text].slice(Math.max(0, seen - (output.offset ?? seen)));
      process.stdout.write(text.join(""));
      seen += text.length;
    }
    if (!news.stream.length) await sleep(100);
  } while (RUNNING.includes(news.status) || news.stream.length);
  console.log();
}
while (RUNNING.includes(job.status)) {
  job = await call(`status/${job.id}`);
  if (RUNNING.includes(job.status)) await sleep(1000);
}
if (job.status !== "COMPLETED") {
  fail(`Job ${job.id} ended ${job.status}: ${job.error ?? "no reason given"}`);
}
if (!values.stream) console.log(job.output.map((chunk) => chunk.text).join(""));
