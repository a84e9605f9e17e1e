package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

const (
	// ecrCall names the call of AWS's registry that returns a password, valid for 12 hours, for an account's access key.
	ecrCall = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken"
	// maxToken bounds AWS's answer, in bytes. Tokens have some 3000 bytes; a smaller bound refuses longer tokens.
	maxToken = 64 << 10
)

// exchange returns the credentials for a registry. It exchanges an access key of AWS for a password of AWS's registry.
// The error contains no secret.
func (s *Store) exchange(ctx context.Context, auth *Auth, transport http.RoundTripper) (*Auth, error) {
	if auth == nil || auth.AWSRegion == "" {
		return auth, nil
	}
	limit := answerFactor * s.cfg.RegistryTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v", limit))
	defer cancel()
	out, err := s.askECR(ctx, *auth, transport)
	if err != nil {
		return nil, fmt.Errorf("exchanging the keys of AWS for a password of its registry: %w", auth.hide(err))
	}
	return out, nil
}

func (s *Store) askECR(ctx context.Context, auth Auth, transport http.RoundTripper) (*Auth, error) {
	url := s.cfg.ECR
	if url == "" {
		url = "https://api.ecr." + auth.AWSRegion + ".amazonaws.com"
		if strings.HasPrefix(auth.AWSRegion, "cn-") {
			url += ".cn"
		}
	}
	body := []byte("{}")
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/x-amz-json-1.1")
	r.Header.Set("X-Amz-Target", ecrCall)
	sum := sha256.Sum256(body)
	keys := aws.Credentials{AccessKeyID: auth.Username, SecretAccessKey: auth.Password}
	if err := v4.NewSigner().SignHTTP(ctx, keys, r, hex.EncodeToString(sum[:]), "ecr", auth.AWSRegion,
		s.cfg.Now()); err != nil {
		return nil, err
	}
	client := &http.Client{Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxToken))
	if err != nil {
		return nil, err
	}
	var answer struct {
		Type    string `json:"__type"`
		Message string `json:"message"`
		Tokens  []struct {
			Token string `json:"authorizationToken"`
		} `json:"authorizationData"`
	}
	err = json.Unmarshal(data, &answer)
	if resp.StatusCode != http.StatusOK {
		kind := answer.Type[strings.LastIndexByte(answer.Type, '#')+1:]
		return nil, fmt.Errorf("AWS answers %s: %.100s: %.300s", resp.Status, kind, answer.Message)
	}
	if err != nil || len(answer.Tokens) == 0 {
		return nil, fmt.Errorf("AWS's answer of %d bytes has no token", len(data))
	}
	pair, err := base64.StdEncoding.DecodeString(answer.Tokens[0].Token)
	user, password, ok := strings.Cut(string(pair), ":")
	if err != nil || !ok {
		return nil, errors.New("AWS's token is not NAME:PASSWORD in base64")
	}
	return &Auth{Username: user, Password: password}, nil
}
