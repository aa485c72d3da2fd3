"""Our routing policies by name. `policy.py` says what a policy is, the modules beside it hold ours, and
`runtime/policies.py` finds those of others.
"""

from __future__ import annotations

from paceline.core.load import REQUEST_TOKENS
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.least import LeastLoad, LeastRequests, Lockstep, PowerOfTwo, RoundRobin
from paceline.core.routing.policy import Policy, Query
from paceline.core.routing.session import Session
from paceline.core.routing.sticky import Sticky

__all__ = [
    "POLICIES", "REQUEST_TOKENS", "Candidate", "Candidates", "LeastLoad", "LeastRequests", "Lockstep",
    "Policy", "PowerOfTwo", "Query", "RoundRobin", "Session", "Sticky",
]  # fmt: skip

POLICIES: dict[str, type[Policy]] = {
    "sticky": Sticky,
    "least-load": LeastLoad,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "round-robin": RoundRobin,
    "prefix": Sticky,
    "session": Session,
    "lockstep": Lockstep,
}
"""`--routing` name to class, of ours."""
