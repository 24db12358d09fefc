"""What was used: records as callers and the operator read them, and the audit of all of them."""
