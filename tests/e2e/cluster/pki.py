"""Certificates and kubeconfigs of a cluster, by openssl."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_VALID_DAYS = "30"


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority in a folder, for one cluster.

    Attributes:
        folder: Holds NAME.key, NAME.crt, and service-account.key, which signs the pods' tokens.
        server: The API server's URL, for kubeconfigs.
    """

    folder: Path
    server: str

    def create(self) -> None:
        """Make the authority and the key of service accounts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        subject = ("-days", _VALID_DAYS, "-subj", "/CN=vigil-cluster-ca")
        key = ("-keyout", str(self.folder / "ca.key"), "-out", str(self.folder / "ca.crt"))
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *key)
        _openssl("genrsa", "-out", str(self.folder / "service-account.key"), "2048")

    def issue(self, name: str, subject: str, names: str = "") -> None:
        """Make NAME.key and NAME.crt for clients and servers.

        Args:
            name: Of the files.
            subject: Such as "/O=system:masters/CN=admin".
            names: The server's, such as "DNS:localhost,IP:127.0.0.1".
        """
        base = self.folder / name
        key = ("-keyout", f"{base}.key", "-out", f"{base}.csr")
        _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", subject, *key)
        extensions = "extendedKeyUsage=serverAuth,clientAuth\n" + (f"subjectAltName={names}\n" if names else "")
        base.with_suffix(".ext").write_text(extensions)
        signing = ("-CA", str(self.folder / "ca.crt"), "-CAkey", str(self.folder / "ca.key"), "-CAcreateserial")
        files = ("-in", f"{base}.csr", "-extfile", f"{base}.ext", "-out", f"{base}.crt")
        _openssl("x509", "-req", "-days", _VALID_DAYS, *signing, *files)

    def kubeconfig(self, name: str, path: Path) -> Path:
        """Write the kubeconfig of an issued client certificate."""
        cluster = {"server": self.server, "certificate-authority": str(self.folder / "ca.crt")}
        user = {
            "client-certificate": str(self.folder / f"{name}.crt"),
            "client-key": str(self.folder / f"{name}.key"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "vigil",
            "clusters": [{"name": "vigil", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "vigil", "context": {"cluster": "vigil", "user": name}}],
        }
        path.write_text(json.dumps(config, indent=1))
        return path


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
