"""Who may call: tokens, certificates, tenants and the files that hold them."""
