package archive

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// sealName is the name of the object that describes the others. No file of a checkpoint has it.
	sealName = "seal.json"
	// maxSeal bounds a seal in bytes. The files of a checkpoint are few, and each has at most 9000 sums of 64 digits and
	// as many MACs of 32.
	maxSeal = 16 << 20
	// format is the version of seals; other versions are refused. The MACs of the pieces did not change it: earlier
	// versions ignore them and verify the sums.
	format = 1
	// purpose begins the data of each MAC, so that a MAC that the same key makes for another purpose is not valid for a
	// seal.
	purpose = "cay checkpoint\n"
)

// seal describes the objects of a checkpoint.
type seal struct {
	Format   int          `json:"format"`
	Name     string       `json:"name"`
	Node     string       `json:"node"`
	Fence    int64        `json:"fence"`
	Number   int64        `json:"number"`
	MadeAt   time.Time    `json:"made_at"`
	CPUClass string       `json:"cpu_class"`
	Agent    string       `json:"agent"`
	Runsc    string       `json:"runsc"`
	Files    []sealedFile `json:"files"`
}

type sealedFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	objects.Pieces
}

// envelope is the content of a seal's object.
type envelope struct {
	Seal json.RawMessage `json:"seal"`
	MAC  []byte          `json:"hmac_sha256"`
}

// newSeal returns the seal of a copy, without files.
func newSeal(c sandbox.StoredCheckpoint) seal {
	return seal{Format: format, Name: c.Name, Node: c.Node, Fence: c.Fence, Number: c.Number, MadeAt: c.MadeAt.UTC(),
		CPUClass: c.CPUClass, Agent: c.Agent, Runsc: c.Runsc}
}

func macOf(key, data []byte) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(purpose))
	mac.Write(data)
	return mac.Sum(nil)
}

// encode returns the seal with its MAC.
func (s seal) encode(key []byte) ([]byte, error) {
	data, err := json.Marshal(s)
	if err == nil {
		data, err = json.Marshal(envelope{data, macOf(key, data)})
	}
	if err != nil {
		return nil, fmt.Errorf("encoding the seal of a checkpoint: %w", err)
	}
	return data, nil
}

// openSeal decodes the seal of a copy. It returns [objects.ErrDamaged] if data is not the recorded seal of c.
func openSeal(key, data []byte, c sandbox.StoredCheckpoint) (seal, error) {
	refuse := func(why string) (seal, error) {
		return seal{}, fmt.Errorf("the seal of the checkpoint of %s %s: %w", c.Name, why, objects.ErrDamaged)
	}
	var e envelope
	if sumOf(data).String() != c.Sum {
		return refuse("is not the recorded one")
	}
	if err := json.Unmarshal(data, &e); err != nil || !hmac.Equal(e.MAC, macOf(key, e.Seal)) {
		return refuse("does not have its MAC")
	}
	var s seal
	if err := json.Unmarshal(e.Seal, &s); err != nil || s.Format != format {
		return refuse("has an unknown format")
	}
	files := s.Files
	if s.Files = nil; !s.equal(newSeal(c)) {
		return refuse("is of another checkpoint")
	}
	for _, f := range files {
		if filepath.Base(f.Name) != f.Name || !filepath.IsLocal(f.Name) || f.Name == "." || f.Name == sealName {
			return refuse(fmt.Sprintf("names a file %.80q", f.Name))
		}
	}
	s.Files = files
	return s, nil
}

// equal reports whether two seals without files are equal.
func (s seal) equal(o seal) bool {
	made := s.MadeAt.Equal(o.MadeAt)
	s.MadeAt, o.MadeAt = time.Time{}, time.Time{}
	return made && fmt.Sprint(s) == fmt.Sprint(o)
}

// sameNames reports whether two seals have files of the same names and sizes.
func (s seal) sameNames(o seal) bool {
	return slices.EqualFunc(s.Files, o.Files, func(f, g sealedFile) bool { return f.Name == g.Name && f.Size == g.Size })
}

func sumOf(data []byte) objects.Sum { return sha256.Sum256(data) }

// sumFile returns the SHA-256 of a file.
func sumFile(f *os.File) (objects.Sum, error) {
	hash := sha256.New()
	_, err := io.Copy(hash, f)
	return objects.Sum(hash.Sum(nil)), err
}
