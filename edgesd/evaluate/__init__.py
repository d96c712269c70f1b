"""Quality metrics: one file each. numpy and pillow only, so that any room above can use them."""
