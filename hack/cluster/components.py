"""Command lines and configurations of the cluster's parts: pure functions of the settings and the addresses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hack.cluster import settings as s

ETCD = "http://127.0.0.1:2379"  # the cluster has its own network namespace, so its own loopback
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"  # a tmpfs of the cluster's own mount namespace


@dataclass(frozen=True)
class Link:
    """The veth pair between this machine and the cluster: one /30."""

    host: str
    node: str


@dataclass(frozen=True)
class Component:
    """A supervised process. It starts once something listens on ``after`` (host, port) and the file ``needs`` exists.
    """

    name: str
    command: list[str]
    after: tuple[str, int] | None = None
    environment: dict[str, str] | None = None
    needs: str | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Identity:
    """A caller of the API server: its file name under ``<state>/credentials`` and what RBAC sees."""

    name: str
    user: str
    groups: tuple[str, ...] = ()


def identities(node: str) -> list[Identity]:
    return [
        Identity("admin", "kubernetes-admin", ("system:masters",)),
        Identity("kube-controller-manager", "system:kube-controller-manager"),
        Identity("kube-scheduler", "system:kube-scheduler"),
        Identity("kube-proxy", "system:kube-proxy"),
        Identity("kubelet", f"system:node:{node}", ("system:nodes",)),
        Identity("cluster-keeper", "system:cluster-keeper", ("system:masters",)),
        Identity("kuberay-operator", "kuberay-operator", ("system:masters",)),
    ]


def api_server_url(link: Link) -> str:
    return f"https://{link.node}:6443"


def kubeconfig(server: str, ca: str, token: str) -> str:
    """JSON, which is YAML. ``ca`` is base64."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "embedded",
            "clusters": [{"name": "embedded", "cluster": {"server": server, "certificate-authority-data": ca}}],
            "users": [{"name": "embedded", "user": {"token": token}}],
            "contexts": [{"name": "embedded", "context": {"cluster": "embedded", "user": "embedded"}}],
        },
        indent=1,
    )


def token_file(tokens: dict[str, str], node: str) -> str:
    """The API server's --token-auth-file: token,user,uid,"groups"."""
    lines = (f'{tokens[who.name]},{who.user},{who.name},"{",".join(who.groups)}"\n' for who in identities(node))
    return "".join(lines)


def audit_policy() -> str:
    """Who wrote what: requests that change objects, without the nodes' heartbeats."""
    writes = ["create", "update", "patch", "delete", "deletecollection"]
    virtual = [{"group": "authentication.k8s.io"}, {"group": "authorization.k8s.io"}]
    rules = [
        {"level": "None", "namespaces": ["kube-node-lease"]},
        {"level": "None", "resources": virtual},
        {"level": "Metadata", "verbs": writes, "omitStages": ["RequestReceived"]},
    ]
    return json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules})


def control_plane(cfg: s.Settings, link: Link) -> list[Component]:
    state, api = cfg.state, (link.node, 6443)
    credentials = state / "credentials"
    pki = state / "pki"
    etcd = ["etcd", "--data-dir=/run/etcd", f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}"]
    etcd += ["--listen-peer-urls=http://127.0.0.1:2380", "--logger=zap"]
    return [
        Component("etcd", etcd, environment={"ETCD_UNSUPPORTED_ARCH": "arm64"}),
        Component("kube-apiserver", _api_server(state, pki, link), after=("127.0.0.1", 2379)),
        Component(
            "kube-controller-manager",
            [
                "kube-controller-manager",
                f"--kubeconfig={credentials / 'kube-controller-manager'}",
                f"--root-ca-file={pki / 'apiserver.crt'}",
                f"--service-account-private-key-file={pki / 'apiserver.key'}",
                "--use-service-account-credentials=true",
                "--leader-elect=false",
                "--controllers=*,-bootstrap-signer-controller,-token-cleaner-controller",
            ],
            after=api,
        ),
        Component(
            "kube-scheduler",
            ["kube-scheduler", f"--kubeconfig={credentials / 'kube-scheduler'}", "--leader-elect=false"],
            after=api,
        ),
    ]


def _api_server(state: Path, pki: Path, link: Link) -> list[str]:
    return [
        "kube-apiserver",
        f"--etcd-servers={ETCD}",
        f"--advertise-address={link.node}",
        f"--bind-address={link.node}",
        f"--cert-dir={pki}",  # makes its own serving certificate there; its key also signs service account tokens
        f"--service-account-key-file={pki / 'apiserver.key'}",
        f"--service-account-signing-key-file={pki / 'apiserver.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-cluster-ip-range={s.SERVICE_RANGE}",
        f"--token-auth-file={state / 'credentials' / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={state / 'audit-policy.json'}",
        f"--audit-log-path={state / 'audit.log'}",
        "--audit-log-maxsize=50",
        "--audit-log-maxbackup=1",
        "--profiling=false",
    ]


def node(cfg: s.Settings, link: Link) -> list[Component]:
    state, api = cfg.state, (link.node, 6443)
    return [
        Component("containerd", ["containerd", "--config", str(state / "containerd.toml")]),
        Component(
            "kubelet",
            [
                "kubelet",
                f"--config={state / 'kubelet.json'}",
                f"--kubeconfig={state / 'credentials' / 'kubelet'}",
                f"--hostname-override={cfg.name}",
                f"--node-ip={link.node}",
                f"--root-dir={state / 'kubelet'}",
            ],
            after=api,
        ),
        Component("kube-proxy", ["kube-proxy", f"--config={state / 'kube-proxy.json'}"], after=api),
    ]


def kubelet_config(cfg: s.Settings, link: Link) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": link.node,
        # The cluster's network namespace is the wall: only its own pods and this machine reach the kubelet.
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cfg.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,  # lowering it needs a capability that many containers lack
        "makeIPTablesUtilChains": False,
        # the supervisor shows the values the kubelet wants, and the machine keeps its own
        "protectKernelDefaults": True,
        # With CoreDNS it listens here; without, a lookup is refused at once instead of timing out.
        "clusterDNS": [link.node],
        "clusterDomain": "cluster.local",
        "resolvConf": str(cfg.state / "resolv.conf"),
        "maxPods": 64,
        # This disk is shared with everything else on the machine, and the images are a few kilobytes.
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    }


def kube_proxy_config(cfg: s.Settings) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(cfg.state / "credentials" / "kube-proxy")},
        "mode": "nftables",
        "clusterCIDR": s.POD_RANGE,
        "hostnameOverride": cfg.name,
        "oomScoreAdj": 0,
        # Sizes of the connection table belong to the machine, not to this namespace.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def containerd_config(cfg: s.Settings, runc: str, cni_plugins: str) -> str:
    """CRI with images copied, not layered (they are a few kilobytes), so that it also works on an overlay file system.
    """
    cri = 'plugins."io.containerd.cri.v1.'
    return f"""version = 3
root = "{cfg.state}/containerd"
state = "/run/containerd"

[grpc]
  address = "{CONTAINERD_SOCKET}"

[{cri}images"]
  snapshotter = "native"
  [{cri}images".pinned_images]
    sandbox = "docker.io/library/{s.PAUSE_IMAGE}"

[{cri}runtime"]
  restrict_oom_score_adj = true
  tolerate_missing_hugetlb_controller = true
  disable_apparmor = true
  [{cri}runtime".cni]
    bin_dirs = ["{cni_plugins}"]
    conf_dir = "{cfg.state}/cni"
  [{cri}runtime".containerd]
    default_runtime_name = "runc"
    [{cri}runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      base_runtime_spec = "{cfg.state}/base-spec.json"
      [{cri}runtime".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = false
"""


def network_config() -> dict[str, Any]:
    """Point-to-point links: every packet between pods is routed, so services work without bridge filtering."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": s.POD_RANGE}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni-addresses",
    }
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "mtu": 1500, "ipam": addresses}]}


def corefile(cfg: s.Settings, link: Link) -> str:
    return f"""cluster.local:53 in-addr.arpa:53 {{
    bind {link.node}
    errors
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {cfg.state}/credentials/cluster-keeper
        ttl 5
    }}
}}
"""


def keepers(cfg: s.Settings, link: Link, python: str) -> list[Component]:
    """What a cloud's cluster has besides: GPUs in the node's status, volumes for claims, and policies that are
    enforced.
    """
    credentials = str(cfg.state / "credentials" / "cluster-keeper")
    modules = {"logical_gpus": [cfg.name], "claims": [], "policies": []}
    return [
        Component(
            module.replace("_", "-"),
            [python, "-m", f"hack.cluster.{module}", credentials, *arguments],
            after=(link.node, 6443),
            environment={"PYTHONPATH": str(cfg.clone)},
        )
        for module, arguments in modules.items()
    ]


def kuberay(cfg: s.Settings, link: Link, python: str) -> list[Component]:
    """The real KubeRay with the DNS that its workers need, or the stand-in."""
    api = (link.node, 6443)
    credentials = str(cfg.state / "credentials" / "kuberay-operator")
    if cfg.kuberay_operator is None:
        command = [python, "-m", "hack.cluster.kuberay_standin", "--kubeconfig", credentials]
        return [Component("kuberay-standin", command, after=api, environment={"PYTHONPATH": str(cfg.clone)})]
    command = [str(cfg.kuberay_operator), "--kubeconfig", credentials, "--enable-leader-election=false"]
    return [
        Component("coredns", ["coredns", "-conf", str(cfg.state / "Corefile")], after=api),
        Component("kuberay-operator", command, after=api),
    ]
