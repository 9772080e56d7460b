"""What did this fine-tuning change in the weights, and what did it cost?"""

from lorabench.api import load as load
