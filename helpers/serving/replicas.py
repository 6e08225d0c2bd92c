"""Several copies of the model: Ray Serve runs the same app in a process each and shares the requests out.

What Ray leaves open, and what to take instead for many GPUs, is written in docs/scaling.md.
"""

import os
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import HelpersError
from ..network import listen
from ..paths import PROJECT_DIR
from .app import create_app
from .engine import QUEUE_SIZE, SLOTS
from .server import log_as_json

NAME = "characterglm"  # of the application on Ray
# Read by Ray when it is imported. The first is its name for "one machine only": it then listens on 127.0.0.1, but for one
# port a replica. The last leaves the model the priority of any other program.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Replicas:
    """How many copies, and where.

    Args:
        replicas: how many there are at least; max_replicas: how many there may be under load, as many by default.
        gpus_per_replica: 0 is the CPU, 0.5 puts two on one GPU; by default 1 if this machine has a GPU.
        ray_address: of a running Ray cluster that this machine belongs to; by default a Ray of its own.
        threads: of each replica, on a CPU; by default the cores are shared out among the replicas.

    Raises:
        HelpersError: senseless numbers.
    """

    replicas: int = 1
    max_replicas: int | None = None
    gpus_per_replica: float | None = None
    ray_address: str | None = None
    threads: int | None = None

    def __post_init__(self):
        if self.replicas < 1 or self.most < self.replicas:
            raise HelpersError(
                f"副本数不合理 [invalid replicas]：--replicas {self.replicas}，--max-replicas {self.most}；"
                "至少 1 个，最多不能少于最少"
            )
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise HelpersError(f"--gpus-per-replica {self.gpus:g} 不行 [invalid GPUs]：0 到 1 之间，或整数")

    @property
    def most(self) -> int:
        return self.max_replicas or self.replicas

    @property
    def gpus(self) -> float:
        return float(torch.cuda.is_available()) if self.gpus_per_replica is None else self.gpus_per_replica

    @property
    def cpus(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.most)

    @property
    def resources(self) -> dict[str, float]:
        return {"num_gpus": self.gpus} if self.gpus else {"num_cpus": self.cpus}


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
            raise HelpersError("推理引擎没有在运行 [engine is down]")


def serve_replicas(model, host: str, port: int, grace_seconds: int, app_options: dict, chosen: Replicas) -> None:
    """Serve until SIGTERM or Ctrl-C; see `serve`.

    Raises:
        HelpersError: no Ray, no such cluster, too few GPUs or CPUs, or no model.
    """
    listen(host, port).close()  # is it free?
    ray = start_ray(chosen)
    from ray import serve

    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has taken them
        signal.signal(number, signal.default_int_handler)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        serve.run(deployment(chosen, grace_seconds, app_options).bind(model, chosen.cpus, app_options), name=NAME)
        threading.Event().wait()
    except RuntimeError as error:
        raise HelpersError(f"副本没有启动 [replicas did not start]：{error}") from None
    except KeyboardInterrupt:
        serve.delete(NAME)  # the replies being written are finished
        serve.shutdown()
    finally:
        ray.shutdown()


def deployment(chosen: Replicas, grace_seconds: int, app_options: dict):
    """What Ray Serve has to know about the replicas."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    scaling = {"num_replicas": chosen.replicas}
    if chosen.most > chosen.replicas:
        limits = {"min_replicas": chosen.replicas, "max_replicas": chosen.most}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": app_options.get("slots", SLOTS)}}
    engines = 1 + len(app_options.get("adapters") or {})
    room = engines * (app_options.get("slots", SLOTS) + app_options.get("queue_size", QUEUE_SIZE))
    return serve.deployment(
        name=NAME,
        ray_actor_options=chosen.resources,
        max_ongoing_requests=room + 16,  # the app itself answers 429 before; a few more for /health and the like
        max_queued_requests=room * chosen.most,
        # Requests with the same x-session-id go to the same replica, whose KV cache has the beginning of the chat.
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        graceful_shutdown_timeout_s=grace_seconds,
        max_constructor_retry_count=1,
        **scaling,
    )(serve.ingress()(Replica))


def start_ray(chosen: Replicas):
    """The module `ray`, started or connected. Raises HelpersError: no Ray, no such cluster, too few GPUs or CPUs."""
    # JupyterLab brings rfc3987_syntax, which `import ray` reaches through jsonschema and which takes 3 s to build its
    # grammar. All of Ray's processes would pay that, and Ray gives up if one of them is not up in time.
    shadow = tempfile.mkdtemp()
    Path(shadow, "rfc3987_syntax.py").write_text("raise ImportError")
    sys.modules.setdefault("rfc3987_syntax", None)
    os.environ.update(ENVIRONMENT if chosen.ray_address is None else {})
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [shadow, str(PROJECT_DIR), os.getenv("PYTHONPATH")]))
    try:
        import ray
    except ImportError:
        raise HelpersError(
            "多个副本需要 Ray [ray required]。请运行 pip install -r requirements-cluster.txt -c constraints.txt"
        ) from None
    try:
        if chosen.ray_address is None:
            ray.init("local", num_cpus=max(os.cpu_count(), chosen.cpus * chosen.most), include_dashboard=False)
        else:
            ray.init(chosen.ray_address, runtime_env={"env_vars": {"PYTHONPATH": str(PROJECT_DIR)}})
    except (OSError, RuntimeError, ValueError) as error:
        raise HelpersError(f"连不上 Ray [no ray cluster]：{chosen.ray_address}：{error}") from None
    return ray
