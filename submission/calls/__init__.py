"""Model calls, in processes of their own."""
