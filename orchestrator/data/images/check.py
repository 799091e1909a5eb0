"""The strict check of a whole image, as `pack --verify` does it. Pure.

While training only what a crop shows is decoded, so damage below it is not seen then. What was
packed carries a checksum of its bytes; this check says whether those bytes were sound.
"""

from orchestrator.data.images.decode import decode_other
from orchestrator.data.images.header import Encoded, checked
from orchestrator.data.images.jpeg import check_jpeg, read_header


def check_image(image: Encoded) -> None:
    """Decode all of an encoded image.

    An image that passes can be shown with any crop; the pixels are thrown away.

    Raises:
        BadImage: with the reasons of `decode`, wherever the damage lies.
    """
    header = read_header(image)
    if header is None:
        decode_other(image)
        return
    checked(header, len(image))
    check_jpeg(image, header)
