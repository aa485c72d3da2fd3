"""Our routing policies by name. `policy.py` says what a policy is, each `routing_*.py` holds some of ours, and
`runtime/policies.py` finds those of others.
"""

from __future__ import annotations

from paceline.protocol.candidates import Candidate, Candidates
from paceline.protocol.policy import REQUEST_TOKENS, Policy, Query
from paceline.protocol.routing_blind import PowerOfTwo, RoundRobin
from paceline.protocol.routing_least import LeastLoad, LeastRequests
from paceline.protocol.routing_lockstep import Lockstep
from paceline.protocol.routing_prefix import Prefix
from paceline.protocol.routing_session import Session

__all__ = [
    "POLICIES", "REQUEST_TOKENS", "Candidate", "Candidates", "LeastLoad", "LeastRequests", "Lockstep",
    "Policy", "PowerOfTwo", "Prefix", "Query", "RoundRobin", "Session",
]  # fmt: skip

POLICIES: dict[str, type[Policy]] = {
    "least-load": LeastLoad,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "round-robin": RoundRobin,
    "prefix": Prefix,
    "session": Session,
    "lockstep": Lockstep,
}
"""`--routing` name to class, of ours."""
