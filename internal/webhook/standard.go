package webhook

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
)

// Secrets of Standard Webhooks: a prefix, and the base64 of the key.
const (
	secretPrefix = "whsec_"
	// leastKey and mostKey bound the key, in bytes, as Standard Webhooks does.
	leastKey, mostKey = 24, 64
	newKey            = 32 // bytes of a key that is made here
)

// TestType is the type of the request that tests a webhook. It is no type of an event.
const TestType = "webhook.test"

// standard is the [Wire] of Standard Webhooks.
type standard struct {
	encode func(event.Event) ([]byte, error)
}

// NewStandard returns the wire of Standard Webhooks. encode returns an event as the feed's API shows it.
func NewStandard(encode func(event.Event) ([]byte, error)) Wire { return standard{encode} }

// Known implements [Wire].
func (standard) Known(kind string) bool { return event.Type(kind).Known() }

// NewSecret implements [Wire].
func (standard) NewSecret() Secret {
	var key [newKey]byte
	rand.Read(key[:]) // never fails: it would end the program instead
	return Secret(secretPrefix + base64.StdEncoding.EncodeToString(key[:]))
}

// CheckSecret implements [Wire].
func (standard) CheckSecret(secret string) error {
	if key, ok := keyOf(Secret(secret)); !ok || len(key) < leastKey || len(key) > mostKey {
		return fault.InvalidField("secret", "must be %s and the base64 of %d to %d bytes", secretPrefix, leastKey, mostKey)
	}
	return nil
}

// keyOf returns the key of a secret.
func keyOf(s Secret) ([]byte, bool) {
	text, ok := strings.CutPrefix(string(s), secretPrefix)
	if !ok || len(text) > base64.StdEncoding.EncodedLen(mostKey) {
		return nil, false
	}
	key, err := base64.StdEncoding.Strict().DecodeString(text)
	// Decoding skips line breaks, which no header may have.
	return key, err == nil && base64.StdEncoding.EncodeToString(key) == text
}

// body is the JSON object of a delivery.
type body struct {
	Type      string          `json:"type"`
	Timestamp time.Time       `json:"timestamp"`
	Data      json.RawMessage `json:"data"`
}

// Message implements [Wire].
func (s standard) Message(_ context.Context, e event.Event) (string, []byte, error) {
	data, err := s.encode(e)
	if err != nil {
		return "", nil, fmt.Errorf("encoding event: %w", err)
	}
	text, err := json.Marshal(body{string(e.Type), e.At.UTC(), data})
	return string(e.Type), text, err
}

// Test implements [Wire].
func (standard) Test(w Webhook, now time.Time) ([]byte, error) {
	data, err := json.Marshal(map[string]string{"webhook_id": w.ID})
	if err != nil {
		return nil, err
	}
	return json.Marshal(body{TestType, now.UTC(), data})
}

// Header implements [Wire].
func (standard) Header(w Webhook, deliveryID string, now time.Time, body []byte) map[string]string {
	seconds := strconv.FormatInt(now.Unix(), 10)
	key, _ := keyOf(w.Secret) // was checked when it was set
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", deliveryID, seconds, body)
	return map[string]string{
		"webhook-id":        deliveryID,
		"webhook-timestamp": seconds,
		"webhook-signature": "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)),
	}
}
