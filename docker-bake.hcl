# The images that this repository makes: `docker buildx bake NAME`, `--print` to see what it would do.
#
#   {cuda,rocm,cpu}-{bundled,unbundled}   one Dockerfile over vLLM's three official images
#   llama-{cpu,cuda,rocm}-{bundled,unbundled}   the same over llama.cpp, for GGUF models
#   {mlc,tabby}-{bundled,unbundled}       the same over MLC and TabbyAPI; nobody has run these yet
#   model-NAME                            a ready-made model, over CUDA
#   iteration                             a new worker/, and the handler in HANDLER_DIR, over an
#                                         image that exists
#
# Set IMAGE to push somewhere, MODEL and MODEL_REVISION for the bundled ones (GGUF for those of
# llama.cpp), HF_TOKEN for gated models: it reaches the build as a secret and stands in no layer.

variable "IMAGE" {
  default = "tripod"
}

variable "VLLM" {
  default = "0.32.0"
}

variable "MODEL" {
  default = "mistralai/Mistral-7B-Instruct-v0.1"
}

variable "MODEL_REVISION" {
  default = ""
}

variable "GGUF" {
  default = "Qwen/Qwen3-8B-GGUF:Q4_K_M"
}

variable "HANDLER_DIR" {
  default = ""
}

group "default" {
  targets = ["cuda-bundled"]
}

target "worker" {
  context    = "."
  dockerfile = "Dockerfile"
  platforms  = ["linux/amd64"]
  secret     = ["id=HF_TOKEN,env=HF_TOKEN"]
  args = {
    CONCURRENCY_MODIFIER = "auto"
  }
}

target "variant" {
  inherits = ["worker"]
  name     = "${base.name}-${weights}"
  matrix = {
    base = [
      { name = "cuda", image = "vllm/vllm-openai:v${VLLM}" },
      { name = "rocm", image = "vllm/vllm-openai-rocm:v${VLLM}" },
      { name = "cpu", image = "vllm/vllm-openai-cpu:v${VLLM}" },
    ]
    weights = ["bundled", "unbundled"]
  }
  args = {
    BASE_IMAGE     = base.image
    MODEL          = weights == "bundled" ? MODEL : ""
    MODEL_REVISION = weights == "bundled" ? MODEL_REVISION : ""
  }
  tags = ["${IMAGE}:${base.name}-${weights}"]
}

target "base" {
  context    = "."
  dockerfile = "deploy/bases.Dockerfile"
  platforms  = ["linux/amd64"]
  name       = "base-${base.name}"
  matrix = {
    base = [
      { name = "llama-cpu", stage = "llama-cpu", gpu = "" },
      { name = "llama-cuda", stage = "llama-gpu", gpu = "cuda" },
      { name = "llama-rocm", stage = "llama-gpu", gpu = "rocm" },
      { name = "mlc", stage = "mlc", gpu = "" },
      { name = "tabby", stage = "tabby", gpu = "" },
    ]
  }
  target = base.stage
  args = {
    LLAMA_GPU = base.gpu
  }
}

target "engine" {
  inherits = ["worker"]
  name     = "${base}-${weights}"
  matrix = {
    base    = ["llama-cpu", "llama-cuda", "llama-rocm", "mlc", "tabby"]
    weights = ["bundled", "unbundled"]
  }
  contexts = {
    engine = "target:base-${base}"
  }
  args = {
    BASE_IMAGE     = "engine"
    MODEL          = weights == "unbundled" ? "" : contains(["mlc", "tabby"], base) ? MODEL : GGUF
    MODEL_REVISION = weights == "bundled" ? MODEL_REVISION : ""
  }
  tags = ["${IMAGE}:${base}-${weights}"]
}

# weights_gb: what is downloaded, in 10^9 bytes: parameters x bytes each.
# kv_bytes: of one token in the KV cache: 2 x layers x heads x size of a head x 2 bytes, counting
# the layers that look back over the whole text.
# gpu_gib: what one request of 25,000 tokens needs, in 2^30 bytes, rounded up:
#   ((weights_gb x 10^9 + kv_bytes x 25,000) / 2^30 + 2 for the engine) / 0.9
# More than one GPU offers: ENGINE_ARGS={"tensor_parallel_size": 2}.
target "model" {
  inherits = ["worker"]
  name     = "model-${replace(model.name, ".", "-")}"
  matrix = {
    model = [
      { name = "mistral-7b", id = "mistralai/Mistral-7B-Instruct-v0.3", license = "Apache-2.0", gated = true, weights_gb = 14.5, kv_bytes = 131072, gpu_gib = 21 },
      { name = "llama-3.1-8b", id = "meta-llama/Llama-3.1-8B-Instruct", license = "Llama 3.1", gated = true, weights_gb = 16.1, kv_bytes = 131072, gpu_gib = 23 },
      { name = "qwen3-8b", id = "Qwen/Qwen3-8B", license = "Apache-2.0", gated = false, weights_gb = 16.4, kv_bytes = 147456, gpu_gib = 24 },
      { name = "gpt-oss-20b", id = "openai/gpt-oss-20b", license = "Apache-2.0", gated = false, weights_gb = 13.8, kv_bytes = 24576, gpu_gib = 18 },
      { name = "qwen3.6-27b", id = "Qwen/Qwen3.6-27B", license = "Apache-2.0", gated = false, weights_gb = 55.6, kv_bytes = 65536, gpu_gib = 62 },
      { name = "gemma-4-31b", id = "google/gemma-4-31B-it", license = "Apache-2.0", gated = false, weights_gb = 62.6, kv_bytes = 81920, gpu_gib = 70 },
      { name = "qwen3.6-35b-a3b", id = "Qwen/Qwen3.6-35B-A3B", license = "Apache-2.0", gated = false, weights_gb = 72.0, kv_bytes = 20480, gpu_gib = 78 },
      { name = "gpt-oss-120b", id = "openai/gpt-oss-120b", license = "Apache-2.0", gated = false, weights_gb = 65.3, kv_bytes = 36864, gpu_gib = 71 },
      { name = "mixtral-8x7b", id = "mistralai/Mixtral-8x7B-Instruct-v0.1", license = "Apache-2.0", gated = true, weights_gb = 93.4, kv_bytes = 131072, gpu_gib = 103 },
      { name = "llama-3.3-70b", id = "meta-llama/Llama-3.3-70B-Instruct", license = "Llama 3.3", gated = true, weights_gb = 141.1, kv_bytes = 327680, gpu_gib = 157 },
    ]
  }
  args = {
    BASE_IMAGE = "vllm/vllm-openai:v${VLLM}"
    MODEL      = model.id
  }
  labels = {
    "tripod.gpu-gib" = "${model.gpu_gib}"
    "tripod.license" = model.license
  }
  tags = ["${IMAGE}:${model.name}"]
}

target "iteration" {
  dockerfile = "Dockerfile.iteration"
  args = {
    WORKER_IMAGE = "${IMAGE}:cuda-bundled"
    HANDLER_DIR  = HANDLER_DIR
  }
  tags = ["${IMAGE}:cuda-bundled-edited"]
}
