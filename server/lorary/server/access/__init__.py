"""Who may call what: tenants and their grants, the guard at the door, and quotas."""
