"""The prompter on the workstation: pairs of a short prompt and a prompt, training, and export."""
