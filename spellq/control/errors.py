"""What the control plane answers when it will not do as asked."""


class Rejected(Exception):
    """The request cannot be served. `status` is HTTP's word for it; the message names the value
    and the remedy."""

    status = 400


class NotFound(Rejected):
    """What the request names is not there (or is somebody else's)."""

    status = 404


class Conflict(Rejected):
    """What the request names is not in a state for it."""

    status = 409


class Unauthorized(Rejected):
    """No token, or one that is not valid (any more)."""

    status = 401
