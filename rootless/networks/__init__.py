"""Networks of several sandboxes, and how one becomes a member. Outside."""
