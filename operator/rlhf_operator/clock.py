"""Times as the API server writes them: RFC 3339, UTC, whole seconds."""

from datetime import UTC, datetime


def stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(stamped: str | None) -> datetime | None:
    """None for nothing and for what is no time: a time that nobody can read limits nothing."""
    if not stamped:
        return None
    try:
        read = datetime.fromisoformat(stamped)
    except ValueError:
        return None
    return read if read.tzinfo else read.replace(tzinfo=UTC)
