"""Several copies of the model: Ray Serve runs the same app in a process each and shares the requests out.

What Ray leaves open, and what to take instead for many GPUs, is written in docs/scaling.md.
"""

import os
import signal
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import EngineError, HelpersError
from ..network import listen
from ..paths import PROJECT_DIR
from .app import create_app
from .engine import QUEUE_SIZE, SLOTS
from .server import log_as_json

NAME = "characterglm"  # of the application on Ray
# Read by Ray when it is imported.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # its name for "one machine only": it listens on 127.0.0.1
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # or the model would have less than the priority of any other program
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",  # every line of the log, as it is
}


@dataclass
class Replicas:
    """How many copies, and where. Raises HelpersError for senseless numbers.

    Args:
        replicas: how many there are at least; max_replicas: how many there may be under load, as many by default.
        gpus_per_replica: 0 is the CPU, 0.5 puts two on one GPU; by default 1 if this machine has a GPU.
        ray_address: of a running Ray cluster that this machine belongs to; by default a Ray of its own.
        threads: of each replica, on a CPU; by default the cores are shared out among the replicas.
    """

    replicas: int = 1
    max_replicas: int | None = None
    gpus_per_replica: float | None = None
    ray_address: str | None = None
    threads: int | None = None

    def __post_init__(self):
        most = self.max_replicas = self.max_replicas or self.replicas
        if self.gpus_per_replica is None:
            self.gpus_per_replica = float(torch.cuda.is_available())
        if not 1 <= self.replicas <= most:
            raise HelpersError(
                f"副本数不合理 [invalid replicas]：--replicas {self.replicas}，--max-replicas {most}；"
                "至少 1 个，最多不能少于最少"
            )
        gpus = self.gpus_per_replica
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise HelpersError(f"--gpus-per-replica {gpus:g} 不行 [invalid GPUs]：0 到 1 之间，或整数")
        self.threads = self.threads or max(1, (os.cpu_count() or 1) // most)


class Replica:
    """The app with a model of its own, in a process of Ray's."""

    async def __init__(self, model, threads: int, app_options: dict):
        torch.set_num_threads(threads)
        log_as_json()
        self.api = create_app(model, **app_options)
        await self.api.state.service.load()  # before Ray sends requests
        if self.api.state.service.failure is not None:
            raise self.api.state.service.failure

    def __serve_build_asgi_app__(self):
        return self.api

    def check_health(self) -> None:
        """Ray replaces a replica of which this fails three times; an engine that died is started again by itself."""
        if self.api.state.service.status != "ready":
            raise EngineError("推理引擎没有在运行 [engine is down]")


def serve_replicas(model, host: str, port: int, grace_seconds: int, app_options: dict, chosen: Replicas) -> None:
    """Serve until SIGTERM or Ctrl-C; see `serve`."""
    listen(host, port).close()  # is it free?
    ray = start_ray(chosen)
    from ray import serve

    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has taken them
        signal.signal(number, signal.default_int_handler)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(deployment(chosen, grace_seconds, app_options).bind(model, chosen.threads, app_options), name=NAME)
        threading.Event().wait()
    except RuntimeError as error:
        raise HelpersError(f"副本没有启动 [replicas did not start]：{error}") from None
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(NAME)  # the replies being written are finished
        if not serve.status().applications:  # a cluster may have others
            serve.shutdown()
        ray.shutdown()


def deployment(chosen: Replicas, grace_seconds: int, app_options: dict):
    """What Ray Serve has to know about the replicas."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    slots, engines = app_options.get("slots", SLOTS), 1 + len(app_options.get("adapters") or {})
    room = engines * (slots + app_options.get("queue_size", QUEUE_SIZE))
    scaling = {"num_replicas": chosen.replicas}
    if chosen.max_replicas > chosen.replicas:
        limits = {"min_replicas": chosen.replicas, "max_replicas": chosen.max_replicas}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": slots}}
    gpus = chosen.gpus_per_replica
    return serve.deployment(
        name=NAME,
        ray_actor_options={"num_gpus": gpus} if gpus else {"num_cpus": chosen.threads},
        max_ongoing_requests=room + 16,  # the app itself answers 429 before; a few more for /health and the like
        max_queued_requests=room * chosen.max_replicas,
        # Requests with the same x-session-id go to the same replica, whose KV cache has the beginning of the chat.
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        graceful_shutdown_timeout_s=grace_seconds,
        max_constructor_retry_count=1,
        **scaling,
    )(serve.ingress()(Replica))


def start_ray(chosen: Replicas):
    """The module `ray`, started or connected. Raises HelpersError: no Ray, no such cluster, too few GPUs."""
    # JupyterLab brings rfc3987_syntax, which `import ray` reaches through jsonschema and which takes 3 s to build its
    # grammar. All of Ray's processes would pay that, and Ray gives up if one of them is not up in time.
    shadow = tempfile.mkdtemp()
    Path(shadow, "rfc3987_syntax.py").write_text("raise ImportError")
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [shadow, str(PROJECT_DIR), os.getenv("PYTHONPATH")]))
    os.environ.update(ENVIRONMENT | (LOOPBACK if chosen.ray_address is None else {}))
    cpus = max(os.cpu_count() or 1, chosen.threads * chosen.max_replicas)
    own = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    joined = {"address": chosen.ray_address, "runtime_env": {"env_vars": {"PYTHONPATH": str(PROJECT_DIR)}}}
    try:
        import ray

        if ":" in (chosen.ray_address or ""):  # is anybody there? Ray itself would try for minutes
            host, _, number = chosen.ray_address.rpartition(":")
            socket.create_connection((host, int(number)), timeout=5).close()
        ray.init(**own if chosen.ray_address is None else joined)
    except ImportError:
        how = "pip install -r requirements-cluster.txt -c constraints.txt"
        raise HelpersError(f"多个副本需要 Ray [ray required]。请运行 {how}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise HelpersError(f"连不上 Ray [no ray cluster]：{chosen.ray_address}：{error}") from None
    needed, there = chosen.gpus_per_replica * chosen.replicas, ray.cluster_resources().get("GPU", 0)
    if needed > there:  # Ray would wait for them for ever
        ray.shutdown()
        raise HelpersError(f"GPU 不够 [not enough GPUs]：{chosen.replicas} 个副本要 {needed:g} 个，只有 {there:g} 个")
    return ray
