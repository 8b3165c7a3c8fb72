"""`helm test`: does the operator answer by its Service, does it hold what it needs, and does one of its replicas lead?

usage: python -m rlhf_operator.smoke URL
"""

import re
import sys
import time
from collections.abc import Callable
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

WAIT_SECONDS, PAUSE_SECONDS = 60.0, 1.0
LEADS = re.compile(r"^rlhf_operator_leader 1(\.0)?$", re.MULTILINE)
Get = Callable[[str], tuple[int, str]]


def get(url: str) -> tuple[int, str]:
    """Status and body; 0 and why where nobody answers."""
    try:
        with urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (URLError, OSError) as error:
        return 0, str(error)


def complaint(url: str, ask: Get = get) -> str:
    """What is wrong now; "" for nothing. A Service picks any replica, so a standby may answer: ask again."""
    status, words = ask(f"{url}/readyz")
    if status != 200:
        return f"{url}/readyz answers {status or 'nothing'}: {words}"
    status, words = ask(f"{url}/metrics")
    if status != 200:
        return f"{url}/metrics answers {status or 'nothing'}: {words[:200]}"
    return "" if LEADS.search(words) else "no replica that answered holds the Lease"


def main(
    url: str, ask: Get = get, wait_seconds: float = WAIT_SECONDS, pause: Callable[[float], None] = time.sleep,
) -> int:
    """The exit code."""
    end = time.monotonic() + wait_seconds
    while wrong := complaint(url, ask):
        if time.monotonic() > end:
            print(wrong, file=sys.stderr)
            return 1
        pause(PAUSE_SECONDS)
    print(f"{url}: ready, and one replica leads")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
