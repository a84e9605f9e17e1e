package imagebuild

import (
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/image"
)

// RootFS finds the images of sandboxes. It implements node.Images.
type RootFS struct {
	Images *image.Store
	// Recheck is called with an image that cannot be used, so that its template is built again.
	Recheck func(image string)
}

// Path returns the verified file of the image with the digest. It refuses an image that cannot be used as unavailable.
func (r RootFS) Path(ctx context.Context, digest string) (string, error) {
	path, err := r.Images.Path(ctx, digest)
	return path, r.refusal(digest, err)
}

// Find returns the error that Path is known to give for an image that is not on this machine. It fetches nothing.
func (r RootFS) Find(ctx context.Context, digest string) error {
	return r.refusal(digest, r.Images.Find(ctx, digest))
}

// refusal returns the error of a sandbox whose image could not be used.
func (r RootFS) refusal(digest string, err error) error {
	if unusable(err) {
		r.Recheck(digest)
		return fault.New(fault.Unavailable, fault.CodeImageUnavailable,
			"the template's image cannot be used and is being built again").After(30 * time.Second).Because(err)
	}
	if errors.Is(err, image.ErrRemoteUnreachable) {
		return fault.New(fault.Unavailable, fault.CodeImageUnavailable,
			"the template's image is not on this machine, and the bucket of images cannot be reached").
			After(30 * time.Second).Because(err)
	}
	if errors.Is(err, image.ErrUnderway) {
		r.Recheck(digest) // if no caller is left when the work finds that the image is gone, the check learns it
		return fault.New(fault.Unavailable, fault.CodeImageUnavailable,
			"this machine is still fetching or verifying the template's image: try again later").
			After(30 * time.Second).Because(err)
	}
	return err
}
