"""Which piece of content is waiting, at work, done or in quarantine, and what is done by these rules."""

from flows.ledger.database import LedgerError
from flows.ledger.ledger import OPEN, STATES, Claim, LeaseLostError, Ledger, Row, Seen, State

__all__ = ["OPEN", "STATES", "Claim", "LeaseLostError", "Ledger", "LedgerError", "Row", "Seen", "State"]
