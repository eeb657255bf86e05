"""A network that takes its time where it is validated, for tests that stop a run meanwhile."""

import time

from vae3d.models.custom_vae import CustomVAE


class SlowVAE(CustomVAE):
    """Trains as its base does; decodes one patch of a validation in a minute."""

    def decode(self, z):
        if not self.training:
            time.sleep(60)
        return super().decode(z)
