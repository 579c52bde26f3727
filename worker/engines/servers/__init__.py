"""Any OpenAI-compatible server as an engine: one that Tripod starts, or one that runs elsewhere.

A new one is a file with a ServerKind, and a row here.
"""

from worker.engines.servers.kind import ServerKind
from worker.engines.servers.llama_cpp import LlamaCpp
from worker.engines.servers.mlc import Mlc
from worker.engines.servers.openllm import OpenLlm
from worker.engines.servers.remote import Remote
from worker.engines.servers.tabby import Tabby

SERVERS: dict[str, type[ServerKind]] = {
    kind.name: kind for kind in (LlamaCpp, OpenLlm, Mlc, Tabby, Remote)
}
"""ENGINE → the kind of server."""
