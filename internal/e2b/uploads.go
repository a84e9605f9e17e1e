package e2b

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/template"
)

// hashPattern matches the names of uploads, which are hashes that clients compute.
var hashPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

func uploadName(r *http.Request) (string, error) {
	hash := r.PathValue("hash")
	if !hashPattern.MatchString(hash) {
		return "", badHash("hash")
	}
	return hash, nil
}

func badHash(field string) error {
	return fault.InvalidField(field, "must be 64 lower-case hexadecimal digits")
}

// uploadTime is the time in which an upload must begin. Clients give an upload an hour.
const uploadTime = time.Hour

// uploadLink answers GET /templates/{ref}/files/{hash}: whether the files are there, and where to
// upload them, which forced uploads do also when they are.
func (s *Handler) uploadLink(w http.ResponseWriter, r *http.Request) error {
	hash, err := uploadName(r)
	if err != nil {
		return err
	}
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	key, until := callOf(r).Who.Key.ID, strconv.FormatInt(time.Now().Add(uploadTime).Unix(), 10)
	url := fmt.Sprintf("%s://%s/templates/%s/files/%s?key=%s&expires=%s&signature=%s", scheme, r.Host,
		template.DefaultTag, hash, key, until, s.uploadSum(key, hash, until))
	reply(w, r, http.StatusCreated, map[string]any{"present": s.Templates.HasUpload(orgOf(r), hash), "url": url,
		"headers": map[string]string{}})
	return nil
}

// uploadSum signs the right of a key to upload files for its organization.
func (s *Handler) uploadSum(key, hash, until string) string {
	return s.sum("upload:" + key + ":" + hash + ":" + until)
}

// uploader returns the owner of a key that still may upload files.
func (s *Handler) uploader(ctx context.Context, key string) (auth.Principal, error) {
	who, err := s.Auth.Holder(ctx, key)
	if err == nil && !who.May(auth.TemplatesWrite) {
		err = fault.New(fault.Denied, fault.CodeScopeMissing, "the key lacks the scope %s", auth.TemplatesWrite)
	}
	return who, err
}

// admitUpload returns the owner of the key that an upload's URL was signed for.
func (s *Handler) admitUpload(r *http.Request, hash string) (auth.Principal, error) {
	if who, forwarded, err := httpserver.CallerOf(r, auth.TemplatesWrite); forwarded {
		return who, err
	}
	q := r.URL.Query()
	key, until := q.Get("key"), q.Get("expires")
	if !same(q.Get("signature"), s.uploadSum(key, hash, until)) {
		return auth.Principal{}, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated, "the URL has no valid signature")
	}
	if end, err := strconv.ParseInt(until, 10, 64); err != nil || time.Now().Unix() > end {
		return auth.Principal{}, fault.New(fault.Unauthenticated, fault.CodeUnauthenticated,
			"the URL is no longer valid: ask for another")
	}
	who, err := s.uploader(r.Context(), key)
	if err != nil {
		return who, err
	}
	callOf(r).Who = who // a refusal below is that of a known caller
	return who, s.Auth.Allow(who)
}

// upload answers PUT /templates/{ref}/files/{hash}, to which clients send no key: the signature in
// the URL opens it, for as long as the key that it was made for lives.
func (s *Handler) upload(w http.ResponseWriter, r *http.Request) error {
	hash, err := uploadName(r)
	if err != nil {
		return err
	}
	who, err := s.admitUpload(r, hash)
	if err != nil {
		return err
	}
	callOf(r).Who = who
	if err := callOf(r).OpenAccount(s.Budget, r, who.Org.ID, httpserver.CallCost); err != nil {
		return err
	}
	here, err := s.relay(w, r, builder)
	if here == nil || err != nil {
		return err
	}
	// An upload may take an hour, in which its key may be revoked.
	still := func(ctx context.Context) error { _, err := s.uploader(ctx, who.Key.ID); return err }
	if err := s.Templates.PutUpload(r.Context(), who.Org.ID, hash, r.Body, r.ContentLength, still); err != nil {
		if broken := callOf(r).Body.Broken(); broken != nil {
			return broken
		}
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
