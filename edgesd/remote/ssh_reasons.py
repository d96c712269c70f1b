"""What OpenSSH's client says when it can't log in, as one line that names the cause."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from edgesd.errors import BoardError, LinkError
from edgesd.remote.board import Address, excerpt


def why_refused(address: Address, said: Sequence[str], seconds: int) -> BoardError:
    """The error that ssh's lines describe."""
    printed = [line.strip() for line in said if line.strip() and not line.startswith("debug")]
    text = "\n".join(printed)

    def match(pattern: str) -> re.Match[str] | None:
        return re.search(pattern, text, re.MULTILINE | re.IGNORECASE)

    if found := match(r"bad owner or permissions on (.*)"):
        return BoardError(
            f"{address}: ssh refuses {found[1]}, which others may change: chmod go-w {found[1]}"
        )
    if found := match(r"could not resolve hostname (.*?): (.*)"):
        return LinkError(
            f"{address}: the name {found[1]} has no address ({found[2]}): check its spelling, and "
            "HostName in ~/.ssh/config"
        )
    if found := match(r"connect to (?:host|address) (\S+) port (\d+): (.*)"):
        host, port, why = found.groups()
        if "timed out" in why:
            return LinkError(
                f"{address}: {host} doesn't answer within {seconds} s: is it on, and on this "
                "network?"
            )
        if "refused" in why:
            return LinkError(
                f"{address}: {host} refuses connections to port {port}: does sshd run there, and "
                "is that its port?"
            )
        return LinkError(
            f"{address}: {host} can't be reached ({why}): is it on, and on this network?"
        )
    if match(r"timed out during banner exchange"):
        return LinkError(
            f"{address} accepts the connection, but sends nothing within {seconds} s: is its sshd "
            "at work?"
        )
    if match(r"host key .*revoked|revoked host key"):
        return BoardError(
            f"{address}: its host key is revoked in known_hosts: the host that answers isn't to be "
            "trusted"
        )
    if found := match(r"host key for (.*) has changed"):
        place = match(r"offending .*key in (.*):(\d+)")
        where = f" (line {place[2]} of {place[1]})" if place else ""
        file = f" -f {shlex.quote(place[1])}" if place else ""
        return BoardError(
            f"{address}: its host key isn't the known one{where}: if the board was set up anew, "
            f"run ssh-keygen{file} -R {shlex.quote(found[1])} and log in once by ssh; if not, "
            "somebody else may answer there"
        )
    if match(r"host key verification failed|no .*host key is known|no hostkey alg"):
        return BoardError(
            f"{address}: its host key isn't known here yet: log in once by ssh and compare it"
        )
    if found := match(r"permission denied \((.*)\)|too many authentication failures"):
        return BoardError(_no_key(address, said, found[1] or ""))
    last = [line for line in printed if not re.match(r"Connection (closed|reset) by", line)]
    words = "; ".join(excerpt(line) for line in (last or printed)[-2:])
    return LinkError(f"{address} can't be reached by SSH: ssh says: {words or 'nothing'}")


def _no_key(address: Address, said: Sequence[str], methods: str) -> str:
    """The message when a board accepts none of the user's keys: which were tried."""
    text = "\n".join(said)
    tried = dict.fromkeys(
        re.findall(r"^debug1: Offering public key: (.*?) [A-Z0-9-]+ SHA", text, re.M)
    )
    absent = re.findall(r"no such identity: (.*?): No such file", text)
    locked = re.findall(r'Load key "(.*?)": (.*)', text)
    notes = [f"tried {', '.join(tried)}"] if tried else ["tried none"]
    notes += [f"{path} isn't there" for path in dict.fromkeys(absent)]
    notes += [f"{path}: {why}" for path, why in dict(locked).items()]
    takes = f"; it takes {methods}" if methods and "publickey" not in methods else ""
    return (
        f"{address} takes none of your keys ({'; '.join(notes)}{takes}): copy one there with "
        "ssh-copy-id, or add the right one to the agent with ssh-add"
    )
