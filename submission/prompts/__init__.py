"""From a pair to the token ids of a prompt, and from an answer to a rewrite prompt."""
