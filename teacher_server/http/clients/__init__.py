"""Requests and answers of other trainers' clients, in their own forms; docs/clients.md."""
